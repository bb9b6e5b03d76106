"""Answers as services give them: each with the prompt that must come of it, or the word its reason must hold."""

from __future__ import annotations

import json
from typing import Any

GOOD = "A tabby cat walks along a sunlit wall, its tail raised, soft side light, medium shot."
REASONING = "Okay, the user wants a prompt of a cat. Let me think about the light and the framing."


def choice(content: Any = None, finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


# content of the message -> GOOD comes of it
GOOD_TEXTS = {
    "plain": GOOD,
    "think": f"<think>\n{REASONING}\n</think>\n\n{GOOD}",
    "opened by the template": f"{REASONING}\n</think>\n\n{GOOD}",
    "upper case": f"<THINK>{REASONING}</THINK>\n{GOOD}",
    "thinking": f"<thinking>{REASONING}</thinking>\n{GOOD}",
    "reasoning": f"<reasoning>{REASONING}</reasoning>\n{GOOD}",
    "twice": f"<think>{REASONING}</think> A draft. <think>{REASONING}</think>{GOOD}",
    "answer": f"<think>{REASONING}</think><answer>{GOOD}</answer>",
    "kimi": f"◁think▷{REASONING}◁/think▷{GOOD}",
    "magistral": f"[THINK]{REASONING}[/THINK]{GOOD}",
    "harmony": f"<|channel|>analysis<|message|>{REASONING}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}",
    "harmony with an end": f"<|channel|>analysis<|message|>{REASONING}<|channel|>final<|message|>{GOOD}<|return|>",
    "harmony stripped": f"analysis{REASONING}assistantfinal{GOOD}",
    "box": f"<think>{REASONING}</think><|begin_of_box|>{GOOD}<|end_of_box|>",
    "seed": f"<seed:think>{REASONING}</seed:think>{GOOD}",
    "gemma": f"<|channel>thought\n{REASONING}<channel|>{GOOD}",
    "quotes": f'"{GOOD}"',
    "Chinese quotes": f"“{GOOD}”",
    "here": f"Here is the extended prompt:\n\n{GOOD}",
    "sure": f"Sure! Here's an enhanced version of your prompt:\n\n**{GOOD}**",
    "bold label": f"**Video Prompt:**\n{GOOD}",
    "bold title": f"**A Cat on a Wall**\n\n{GOOD}",
    "heading": f"### Rewritten Prompt\n\n{GOOD}",
    "lead-in and heading": f"Here is the rewritten prompt:\n\n## Cat\n{GOOD}",
    "note": f"{GOOD}\n\n*Note: I kept the subject and added film terms as requested.*",
    "word count": f"{GOOD}\n\n(Word count: 16)",
    "let me know": f"{GOOD}\n\nLet me know if you'd like any changes!",
    "quotes and a note": f'"{GOOD}"\n\nThis prompt keeps the cat.',
    "JSON": json.dumps({"prompt": GOOD}),
    "JSON with more": json.dumps({"subject": "cat", "video_prompt": GOOD}),
    "JSON inside JSON": json.dumps({"size": 5, "output": {"prompt": GOOD, "style": "x"}}),
    "below": f"Below is the rewritten prompt:\n{GOOD}",
    "notes": f"{GOOD}\n\n**Notes:**\n- I kept the cat.",
    "turns": f"<start_of_turn>{GOOD}<end_of_turn>",
    "JSON list": json.dumps([GOOD]),
    "fenced JSON": "```json\n" + json.dumps({"prompt": GOOD}, indent=1) + "\n```",
    "fence": f"```\n{GOOD}\n```",
    "fence in a line": f"```{GOOD}```",
    "options": f"Option 1:\n{GOOD}\n\nOption 2:\nA black cat runs.",
    "bold options": f"**Option 1 (calm):** {GOOD}\n\n**Option 2 (fast):** A black cat runs.",
    "versions": f"Version 1:\n{GOOD}\nVersion 2:\nA black cat runs.",
    "Chinese label": f"改写后的提示词：\n{GOOD}",
    "Chinese lead-in": f"以下是优化后的视频提示词：\n\n{GOOD}",
    "number": f"1. {GOOD}",
    "bullet": f"- {GOOD}",
    "rules": f"---\n{GOOD}\n---",
    "NUL": GOOD.replace("cat", "cat\0"),
    "zero width and direction": GOOD.replace("cat", "c\u200bat\u202e\u2066"),
    "lone surrogate": f"{GOOD}\ud83d",
    "escape": f"\x1b[31m{GOOD}\x1b[0m".replace("[31m", "").replace("[0m", ""),
}
# content of the message -> no prompt; a word of the reason
BAD_TEXTS = {
    "sorry": ("I'm sorry, but I can't assist with that request.", "refused"),
    "cannot": ("I cannot create this content.", "refused"),
    "will not": ("I won't be able to help with that.", "refused"),
    "apology": ("I apologize, but I can't help with this request.", "refused"),
    "unable": ("Unfortunately, I am unable to help with that.", "refused"),
    "Chinese refusal": ("抱歉，我无法满足这个请求。", "refused"),
    "no end": (f"<think>{REASONING}", "reasoning"),
    "no end of a channel": (f"<|channel|>analysis<|message|>{REASONING}", "reasoning"),
    "JSON without a prompt": ('{"width": 5}', "JSON"),
    "damaged JSON": ('{"prompt": "a cat', "JSON"),
    "deep JSON": ("[" * 200_000, "characters"),
    "deep JSON, short": ("[" * 9_000, "JSON"),
    "long": ("x" * 5000, "characters"),
}
# body of the answer -> no prompt; a word of the reason
BAD_BODIES: dict[str, tuple[Any, str]] = {
    "length": (choice(GOOD[:40], "length"), "length"),
    "filter": (choice(GOOD[:40], "content_filter"), "filter"),
    "filtered away": (choice(None, "content_filter"), "filter"),
    "refusal": (choice(None, refusal="I can't help with that."), "refused"),
    "tool": (choice(None, "tool_calls", tool_calls=[{"id": "1", "type": "function"}]), "tool"),
    "reasoning alone": (choice("", reasoning_content=REASONING), "no text"),
    "reasoning cut": (choice(None, "length", reasoning_content=REASONING), "length"),
    "error with status 200": ({"error": {"message": "No endpoints found", "code": 404}}, "No endpoints found"),
    "error as text": ({"error": "model not found"}, "model not found"),
    "broken off": ({"choices": [{**choice("A t", "error")["choices"][0], "error": {"message": "gone"}}]}, "gone"),
    "stream": (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "not JSON"),
    "page": (b"<html>captive portal</html>", "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "number of many digits": (b"1" * 5000, "not JSON"),
    "large": (b'"' + b"x" * (1 << 21) + b'"', "1 MB"),
}
# status, body -> a word of the reason
STATUSES: dict[str, tuple[int, Any, str]] = {
    "text": (404, {"error": 'model "x" not found, try pulling it first'}, "try pulling it first"),
    "message": (400, {"error": {"message": "System role not supported", "code": 400}}, "System role"),
    "detail": (422, {"detail": [{"loc": ["body", "seed"], "msg": "extra fields not permitted"}]}, "extra fields"),
    "plain detail": (422, {"detail": "no such model"}, "no such model"),
    "credit": (402, {"error": {"message": "Insufficient Balance"}}, "Insufficient Balance"),
    "quota": (429, {"error": {"message": "You exceeded your current quota"}}, "quota"),
    "page": (413, b"<html>413 Request Entity Too Large</html>", "413"),
    "large page": (400, b"x" * (1 << 21), "400"),
}
