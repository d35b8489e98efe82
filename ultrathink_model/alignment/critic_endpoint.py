"""An OpenAI-compatible endpoint as the critic: asked one text at a time, with retries, a time limit and a budget."""

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from ultrathink_model.alignment.constitution import cut_answer
from ultrathink_model.config.constitutional import ConstitutionalConfig
from ultrathink_model.errors import CriticError

# Seconds before the first retry; each further one waits twice as long, up to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
BLOCK_BYTES, LARGEST_ANSWER = 1 << 14, 1 << 22
LETTER = re.compile(r"\b([AB])\b")
# Where an endpoint does not count tokens: characters of English in one.
CHARACTERS_PER_TOKEN = 4

logger = logging.getLogger(__name__)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class EndpointCritic:
    """A model behind `POST /chat/completions`.

    The key comes from the environment alone, and stands in no message. An answer that does not come, or makes no
    sense, is None; see `constitutional.on_bad_answer` for what follows.

    Args:
        section: Address, model, limits.

    Attributes:
        tokens: Tokens asked and answered so far.
    """

    def __init__(self, section: ConstitutionalConfig) -> None:
        self._section = section
        self._url = f"{(section.critic_url or '').rstrip('/')}/chat/completions"
        self._where = f"the critic at {self._url}"
        self._key = os.environ.get(section.critic_key_variable)
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.tokens = 0

    def write(self, texts: Sequence[str], _number: int) -> list[str | None]:
        """What the endpoint goes on with; see `Critic`."""
        answers = [self._ask(text, self._section.response_tokens, self._section.temperature) for text in texts]
        return [cut_answer(answer) or None if answer else None for answer in answers]

    def choose(self, texts: Sequence[str]) -> list[float | None]:
        """1 or 0 by the one letter that the endpoint answers with; see `Critic`."""
        return [self._letter(self._ask(text, 8, 0.0)) for text in texts]

    def _letter(self, answer: str | None) -> float | None:
        found = set(LETTER.findall(answer or ""))
        return None if len(found) != 1 else float(found == {"A"})

    def _ask(self, text: str, max_tokens: int, temperature: float) -> str | None:
        """The answer to one text; None where there is none."""
        section = self._section
        if self.tokens >= section.critic_token_budget:
            self._note_bad(
                f"has used {self.tokens} tokens of constitutional.critic_token_budget={section.critic_token_budget}; "
                "raise it"
            )
            return None
        body = {
            "model": section.critic_model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        problem = ""
        for attempt in range(section.critic_retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                return self._read(json.loads(self._post(body)), text)
            except urllib.error.HTTPError as error:
                problem = f"answers {error.code}: {self._safe(error.read(500).decode('utf-8', 'replace'))}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise CriticError(
                        f"{self._where} {problem}; check constitutional.critic_url, critic_model and the key in "
                        f"${section.critic_key_variable}."
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                problem = f"does not answer: {self._safe(str(error) or type(error).__name__)}"
            except (ValueError, LookupError, TypeError):
                problem = "answers with something that is no chat completion"
            logger.warning("%s %s (attempt %d of %d)", self._where, problem, attempt + 1, section.critic_retries + 1)
        self._note_bad(problem)
        return None

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limit = self._section.critic_timeout_seconds
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        ends = time.monotonic() + limit
        with self._opener.open(request, timeout=limit) as response:
            parts: list[bytes] = []
            # The library's limit is on each read, and an answer may come drop by drop.
            while block := response.read1(BLOCK_BYTES):
                parts.append(block)
                if time.monotonic() > ends:
                    raise TimeoutError(f"constitutional.critic_timeout_seconds={limit:g} passed")
                if sum(map(len, parts)) > LARGEST_ANSWER:
                    raise ValueError("larger than any answer")
            return b"".join(parts)

    def _read(self, answer: Any, text: str) -> str:
        content = answer["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("content is no text")
        used = (answer.get("usage") or {}).get("total_tokens")
        self.tokens += used if isinstance(used, int) else (len(text) + len(content)) // CHARACTERS_PER_TOKEN
        return content

    def _note_bad(self, problem: str) -> None:
        """Ends the run where the config says so; else the caller goes on without the answer."""
        if self._section.on_bad_answer == "error":
            raise CriticError(
                f"{self._where} {problem}. The prompts that were done before are kept; start again to go on."
            )

    def _safe(self, message: str) -> str:
        return " ".join((message.replace(self._key, "***") if self._key else message).split())
