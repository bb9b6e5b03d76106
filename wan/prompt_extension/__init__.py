"""Prompt extension, and what may be asked of it."""

METHODS = ("local_qwen", "dashscope", "openai")
LANGUAGES = ("zh", "en")  # of the extended prompt
ON_ERROR = ("raw", "fail")  # keep the user's prompt, with a warning; or end the run
