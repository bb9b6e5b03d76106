"""Wan2.2 video generation. The public classes are imported on first use, so that `import wan` stays cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan.image2video import WanI2V as WanI2V
    from wan.text2video import WanT2V as WanT2V
    from wan.textimage2video import WanTI2V as WanTI2V

__version__ = "0.2.0"
__all__ = ["WanI2V", "WanT2V", "WanTI2V", "open"]


def __getattr__(name: str) -> Any:
    from pkgutil import resolve_name

    if name == "open":
        return resolve_name("wan.runner.session:Session")
    if name in __all__:
        from wan.configs import TASKS

        homes = (config.public_class for config in TASKS.values())
        return resolve_name(next(home for home in homes if home.endswith(f":{name}")))
    raise AttributeError(f"module 'wan' has no attribute {name!r}")
