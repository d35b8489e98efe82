"""The checksums of payment cards, bank accounts and national identity numbers."""

# First digits of the large card schemes, with the lengths that they issue.
CARD_LENGTHS = (
    (("4",), (13, 16, 19)),
    (("51", "52", "53", "54", "55", *(str(start) for start in range(222, 273))), (16,)),
    (("34", "37"), (15,)),
    (("300", "301", "302", "303", "304", "305", "36", "38", "39"), (14,)),
    (("6011", "64", "65", "62", "35", "60"), (16, 17, 18, 19)),
    (("50", "56", "57", "58", "67"), (13, 14, 15, 16, 17, 18, 19)),
)
DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
CODICE_PLACES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CODICE_ODD = [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14]
CODICE_ODD += [16, 10, 22, 25, 24, 23]


def digits(text: str) -> list[int]:
    """The decimal digits of a text, as numbers."""
    return [int(character) for character in text if "0" <= character <= "9"]


def weighted(values: list[int], weights: list[int]) -> int:
    """The sum of values by their weights."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def is_luhn(values: list[int]) -> bool:
    """Whether digits keep Luhn's rule: every second one from the right doubled, and the sum a multiple of ten."""
    doubled = [sum(divmod(2 * value, 10)) for value in values[-2::-2]]
    return (sum(values[::-2]) + sum(doubled)) % 10 == 0


def is_card(text: str) -> bool:
    """A payment card's number: a scheme's first digits and length, and Luhn's rule."""
    values = digits(text)
    number = "".join(map(str, values))
    known = any(number.startswith(starts) and len(number) in lengths for starts, lengths in CARD_LENGTHS)
    return known and is_luhn(values)


def is_iban(text: str) -> bool:
    """An international bank account number (ISO 13616): the remainder by 97 of the turned number is one."""
    code = text.replace(" ", "").replace("-", "")
    if not 15 <= len(code) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


def is_cpf(text: str) -> bool:
    """Brazil's CPF: two check digits by weights that fall to 2."""
    values = digits(text)
    checks = [weighted(values[:count], list(range(count + 1, 1, -1))) * 10 % 11 % 10 for count in (9, 10)]
    return len(set(values)) > 1 and values[9:] == checks


def is_dni(text: str) -> bool:
    """Spain's DNI and NIE: a letter by the remainder of 23; the NIE's X, Y, Z stand for 0, 1, 2."""
    number = text.replace("-", "")
    first = str("XYZ".index(number[0])) if number[0] in "XYZ" else number[0]
    return DNI_LETTERS[int(first + number[1:-1]) % 23] == number[-1]


def is_nir(text: str) -> bool:
    """France's NIR: a month, and 97 less the remainder by 97 as the last two digits."""
    number = text.replace(" ", "")
    return 1 <= int(number[3:5]) <= 42 and 97 - int(number[:13]) % 97 == int(number[13:])


def is_codice(text: str) -> bool:
    """Italy's codice fiscale: a letter by the places of the others."""
    places = [CODICE_PLACES.index(character) for character in text[:15]]
    odd = sum(CODICE_ODD[place] for place in places[::2])
    even = sum(place - 10 if place >= 10 else place for place in places[1::2])
    return chr(ord("A") + (odd + even) % 26) == text[15]


def is_nhs(text: str) -> bool:
    """Britain's NHS number: weights 10 to 2, modulo 11."""
    values = digits(text)
    return (11 - weighted(values[:9], list(range(10, 1, -1))) % 11) % 11 == values[9]


def is_pesel(text: str) -> bool:
    """Poland's PESEL: a date of birth whose month carries the century, and weights 1, 3, 7, 9."""
    values = digits(text)
    month, day = (10 * values[2] + values[3]) % 20, 10 * values[4] + values[5]
    check = (10 - weighted(values[:10], [1, 3, 7, 9, 1, 3, 7, 9, 1, 3]) % 10) % 10
    return 1 <= month <= 12 and 1 <= day <= 31 and check == values[10]


def is_bsn(text: str) -> bool:
    """The Netherlands' BSN: weights 9 to 2 and -1, a multiple of 11."""
    return weighted(digits(text), [9, 8, 7, 6, 5, 4, 3, 2, -1]) % 11 == 0
