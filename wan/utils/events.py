"""The events of `--json`: one JSON object a line on stdout, its kind under "event", with the fields that stand here.

While a video is made, every event has that job's "index" too. A run of videos has one "summary", a dry run ends with
"checked"; a run that ends with another code than 0 has an "error", or failed jobs in its summary.
"""

from __future__ import annotations

# Kind -> when it comes, and type by field: text, number, truth, list or object; "?" where it may be null.
EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "plan": ("everything is checked; nothing is loaded yet", {
        "task": "text", "solver": "text?", "shift": "number?", "preset": "text?", "steps": "list", "loras": "object",
        "fingerprints": "object", "device": "text", "dtype": "text", "attention": "text", "layout": "text",
        "weight_bytes": "object", "peak_bytes": "object?", "jobs": "list", "expected": "object?", "host": "object",
        "disk": "list", "warnings": "list"}),
    "begin": ("a stage begins", {"stage": "text", "total": "number?", "unit": "text"}),
    "advance": ("a stage goes on", {
        "stage": "text", "done": "number", "total": "number?", "unit": "text", "note": "text", "seconds": "number"}),
    "end": ("a stage ends, whole or not", {
        "stage": "text", "done": "number", "unit": "text", "seconds": "number", "whole": "truth"}),
    "message": ("a line for people", {"text": "text"}),
    "saved": ("a video is there", {"index": "number", "file": "text", "frames": "number"}),
    "failed": ("a video could not be made", {"index": "number", "file": "text", "reason": "text"}),
    "elsewhere": ("another process makes it", {"index": "number", "file": "text"}),
    "there": ("a clip of a chain was there already", {"index": "number", "file": "text"}),
    "joined": ("a chain's video is there", {"file": "text"}),
    "not joined": ("a chain's video could not be made", {"file": "text", "reason": "text"}),
    "extended": ("--extend_only has written its file", {"file": "text"}),
    "checked": ("the end of a --dry_run", {}),
    "summary": ("the end of a run: how many videos", {
        "saved": "number", "there already": "number", "failed": "number", "being made by other processes": "number",
        "not tried": "number", "joined": "number", "not joined": "number"}),
    "error": ("the run ends with this exit code", {"code": "number", "problems": "list"}),
}  # fmt: skip
# What the lists and objects of a plan hold, by their field: those of each entry.
EVENT_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "steps": ("guidance 1: none", {"timestep": "number", "expert": "text", "guidance": "number", "lora": "number"}),
    "jobs": ("the videos; done: --resume has found it", {
        "index": "number", "prompt": "text", "size": "list", "image": "text?", "frames": "number", "tokens": "number",
        "seed": "number", "save_file": "text", "joined": "text?", "done": "truth"}),
    "expected": ("seconds by rates that wan.doctor measured: of the longest video by stage, until all are made", {
        "stages": "object", "whole": "number", "communication": "truth"}),
    "host": ("bytes of memory, for all processes on this machine", {"needed": "number?", "available": "number"}),
    "disk": ("bytes to write, an estimate with its spread", {
        "folder": "text", "needed": "number", "least": "number", "most": "number", "free": "number?"}),
}  # fmt: skip
