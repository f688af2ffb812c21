"""A table of claims, the paper's and others, from the verdicts in the sections of the report."""

import re
from collections.abc import Iterable

from benchmarks.report.formatting import table

_CLAIM = re.compile(r"^(?P<source>The paper|Beyond the paper): \*(?P<claim>.+?)\*[:.,]? *(?P<rest>.*)$", re.MULTILINE)
_NUMBERS = re.compile(r"[;,] (?=Fréchet distance)")


def claims(sections: Iterable[str]) -> str:
    """A row for each sentence "The paper: *claim*: verdict; numbers." or "Beyond the paper: ..." of the sections."""
    rows = []
    for text in sections:
        title = text.split("\n", 1)[0].removeprefix("## ")
        for found in _CLAIM.finditer(text):
            verdict, *numbers = _NUMBERS.split(found["rest"].rstrip("."), maxsplit=1)
            claim = found["claim"] + ("" if found["source"] == "The paper" else ", not in the paper")
            rows.append((claim, verdict.removeprefix("Here: "), numbers[0] if numbers else "", title))
    return "\n\n".join(("## Claims", table(("claim", "verdict here", "numbers", "section"), rows)))
