"""The original's prompt expanders, for scripts written for it."""

from wan.prompt_extension.expanders import DashScopePromptExpander, PromptOutput, QwenPromptExpander

__all__ = ["DashScopePromptExpander", "PromptOutput", "QwenPromptExpander"]
