import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.data.cleaning import checksums
from ultrathink_model.data.cleaning.pii import mask_pii
from ultrathink_model.data.sotu import SotuSource


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to bob.smith+x@example.co.uk, please", "write to <EMAIL>, please"),
        ("müller@bücher.example.de", "<EMAIL>"),
        ("card 4111 1111 1111 1111, or 378282246310005.", "card <CARD>, or <CARD>."),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN <ID>."),
        ("SSN 123-45-6789", "SSN <ID>"),
        ("CPF 529.982.247-25", "CPF <ID>"),
        ("DNI 12345678Z, NIE X1234567L", "DNI <ID>, NIE <ID>"),
        ("NIR 2 55 08 14 168 025 38", "NIR <ID>"),
        ("codice RSSMRA85T10A562S", "codice <ID>"),
        ("NHS 943 476 5919", "NHS <ID>"),
        ("PESEL 44051401359", "PESEL <ID>"),
        ("BSN: 111222333", "BSN: <ID>"),
        ("from 192.168.0.1:80 or 2001:db8::ff00:42:8329", "from <IP>:80 or <IP>"),
        ("+1 (415) 555-2671 or +44 20 7946 0958", "<PHONE> or <PHONE>"),
        ("(415) 555-2671, 415.555.2671, 1-800-555-0199", "<PHONE>, <PHONE>, <PHONE>"),
        ("call me at 5551234567 tonight", "call me at <PHONE> tonight"),
        ("Tel.: 030 / 901820 11", "Tel.: <PHONE>"),
        ("06 12 34 56 78", "<PHONE>"),
    ],
)
def test_personal_data_are_masked(text, masked):
    assert mask_pii(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "at 12:30:45 on 2020-01-02, for 1,234,567 dollars",
        "in millions: 1947 $35,860; 1946 67,229; 1945 100,031; 1940 9,252",
        "ISBN 978-3-16-148410-0 and std::vector<int>",
        "4111 1111 1111 1112 is no card, DE88370400440532013000 no account",
        "529.982.247-26, 12345678A, RSSMRA85T10A562T, 44051401358",
        "999.1.1.1 and 1.2.3 are no addresses; user@host neither",
        "666-12-3456 was never given to anybody",
        "pages 123-45, sections 3.1.4, room 0123",
    ],
)
def test_what_only_looks_alike_is_kept(text):
    assert mask_pii(text) == (text, {})


def test_nothing_is_masked_in_the_speeches():
    assert not any(mask_pii(str(row.text))[1] for row in SotuSource().rows("train"))


@given(text=st.text())
def test_text_without_digits_and_signs_is_kept(text):
    plain = "".join(character for character in text if character not in "@:" and not character.isdigit())
    assert mask_pii(plain) == (plain, {})


@given(digits=st.lists(st.integers(0, 9), min_size=8, max_size=18))
def test_luhn_finds_every_wrong_digit(digits):
    check = next(value for value in range(10) if checksums.is_luhn([*digits, value]))
    number = [*digits, check]
    for place in range(len(number)):
        wrong = list(number)
        wrong[place] = (wrong[place] + 1) % 10
        assert not checksums.is_luhn(wrong)


def test_masks_are_counted_and_the_rest_of_a_long_text_is_kept():
    words = ["plain"] * 2000
    places = random.Random(1).sample(range(2000), 50)
    for place in places:
        words[place] = "ann@example.org"
    masked, counts = mask_pii(" ".join(words))
    assert counts == {"<EMAIL>": 50}
    assert masked == " ".join("<EMAIL>" if word == "ann@example.org" else word for word in words)
