"""Text that looks as if it named a person: mail addresses, telephone, card and account numbers. A warning, not a finding.

By its form alone: an invented number warns, a name does not. What looks so is counted and placed, never repeated. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from p2d.wording import counted

PHONE_DIGITS = 9
"""Fewest of a telephone number, so that a sum such as +12 30 40 is none."""

MAX_LINES = 20
"""Lines named of each kind."""

NAMES = {
    "email": "an e-mail address",
    "phone": "a telephone number",
    "card": "a payment card's number",
    "iban": "a bank account's number",
    "us_ssn": "a US social security number",
}
"""Kinds, in words."""

# All repeats are bounded, so that no text makes them slow.
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}+@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}")
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{2,4}(?:[ .-]?[0-9]{2,4}){1,4}"  # +49 151 2345678
    r"|\([0-9]{3}\) ?[0-9]{3}[-. ][0-9]{4}|[0-9]{3}[-.][0-9]{3}[-.][0-9]{4})(?![\w-])"  # (555) 123-4567
)
_CARD = re.compile(r"(?<![\w.-])[3-6][0-9]{3}(?:[ -]?[0-9]{2,6}){2,4}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])")

# What every number above holds. Without one, which is the rule, the slower patterns are not asked.
_RUN = re.compile(r"[0-9+(][0-9 ().-]{8,40}[0-9]")
_COUNTRY = re.compile(r"[A-Z]{2}[0-9]{2}[ A-Z0-9]{11}")


def kinds_in(text: str) -> Iterator[str]:
    """The kinds that stand in the text, each once."""
    if "@" in text and _EMAIL.search(text):
        yield "email"
    if _COUNTRY.search(text) and any(_is_iban(found.group()) for found in _IBAN.finditer(text)):
        yield "iban"
    if not _RUN.search(text):
        return
    if any(_count(found.group()) >= PHONE_DIGITS for found in _PHONE.finditer(text)):
        yield "phone"
    if any(_is_card(found.group()) for found in _CARD.finditer(text)):
        yield "card"
    if _SSN.search(text):
        yield "us_ssn"


class PersonalData:
    """Rows that look so, counted while they go by."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._lines: dict[str, list[int]] = {}

    def add(self, line: int, *texts: str) -> None:
        """Look at one row."""
        for kind in {kind for text in texts for kind in kinds_in(text)}:
            self._rows[kind] = self._rows.get(kind, 0) + 1
            lines = self._lines.setdefault(kind, [])
            if len(lines) < MAX_LINES:
                lines.append(line)

    def found(self) -> dict[str, dict[str, int | list[int]]]:
        """Kind -> `rows`, and `lines` of the first of them."""
        return {kind: {"rows": self._rows[kind], "lines": self._lines[kind]} for kind in NAMES if kind in self._rows}

    def warnings(self) -> list[str]:
        """The same in words, for a dataset's report."""
        said = []
        for kind, rows in sorted(self._rows.items(), key=lambda one: list(NAMES).index(one[0])):
            looks = counted(rows, f"row looks as if it held {NAMES[kind]}", f"rows look as if they held {NAMES[kind]}")
            said.append(f"{looks}, the first in line {self._lines[kind][0]}.")
        return said


def _count(text: str) -> int:
    return sum(char.isdigit() for char in text)


def _is_card(text: str) -> bool:
    """Whether the digits pass the check of payment cards (Luhn, ISO/IEC 7812)."""
    digits = [int(char) for char in text if char.isdigit()]
    if not 13 <= len(digits) <= 19:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether it passes the check of account numbers (ISO 13616)."""
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
