"""Everything that can be measured on this machine, one part after the other: `python -m benchmarks`."""

import subprocess
import sys

from benchmarks.measure import ROOT

PARTS = ("command_line", "transformer", "vae", "text_encoder", "loading", "gguf_reading", "lora_merge")

if __name__ == "__main__":
    failed = [p for p in PARTS if subprocess.run([sys.executable, "-m", f"benchmarks.{p}"], cwd=ROOT).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
