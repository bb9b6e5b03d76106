"""Prompt extension: a language model lengthens short prompts before any video weight is loaded."""

METHODS = ("local_qwen", "dashscope", "openai")
LANGUAGES = ("zh", "en")  # of the extended prompt
ON_ERROR = ("raw", "fail")  # keep the user's prompt, with a warning; or end the run
