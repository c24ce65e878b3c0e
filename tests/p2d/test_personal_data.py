"""Laws of what looks like personal data: forms and check digits warn, other numbers do not, and no text makes it slow."""

from __future__ import annotations

import time

import pytest

from p2d.personal_data import MAX_LINES, NAMES, PersonalData, kinds_in

LOOKS = {
    "email": ["write to ada.lovelace+x@example.co.uk.", "<a@b.org>"],
    "phone": ["+49 151 2345678", "call +1 (555) 123-4567 now", "(555) 123-4567", "555-123-4567", "+442071234567"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "us_ssn": ["his number is 078-05-1120."],
}

PLAIN = [
    *(
        "2 + 2 = 4",
        "1,234,567.89 dollars",
        "3.14159265358979323846",
        "10000000000000",
        "2026-11-25 17:05:00",
        "@home a@b",
    ),
    *(
        "4111 1111 1111 1112",
        "DE88 3704 0044 0532 0130 00",
        "000-12-3456",
        "123-45-67890",
        "12-34-5678",
        "ISBN 978-3-16-148410-0",
    ),
    *("5+555 = 560", "1990-2000-2010", "v1.2.3-456-7890x", "192.168.100.200", "x" * 200),
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in LOOKS.items() for text in texts])
def test_what_has_the_form_and_the_check_digits_is_told(kind: str, text: str) -> None:
    assert kind in set(kinds_in(text))


@pytest.mark.parametrize("text", PLAIN)
def test_other_numbers_and_signs_are_not(text: str) -> None:
    assert list(kinds_in(text)) == []


def test_rows_are_counted_and_placed_and_never_repeated() -> None:
    data = PersonalData()
    for line in range(1, 61):
        data.add(
            line, "a@example.org and b@example.org" if line % 2 else "nothing", "+49 151 2345678" if line == 8 else ""
        )

    assert data.found() == {
        "email": {"rows": 30, "lines": [2 * n + 1 for n in range(MAX_LINES)]},
        "phone": {"rows": 1, "lines": [8]},
    }
    assert data.warnings() == [
        "30 rows look as if they held an e-mail address, the first in line 1.",
        "1 row looks as if it held a telephone number, the first in line 8.",
    ]
    assert set(LOOKS) == set(NAMES)


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "12-", "a@", "a.", "@a.a", "A1", "+1", "(", "123-", "DE89 3704 ", "( ", "1" + " " * 40, "DE89"]
)
def test_no_text_makes_it_slow(piece: str) -> None:
    text = piece * (300_000 // len(piece))
    start = time.process_time()

    list(kinds_in(text))

    assert time.process_time() - start < 2.0  # 0.3 MB; a pattern that backtracks would take minutes
