r"""Numbers as models write them, read as values.

Understood besides plain digits: thousands separators (1,000, 1'000, 1_000, 1 000 with any kind of
space, 1.000.000, and India's 1,00,000), LaTeX's forms of them ({,}, \, and their like), currency
signs, every Unicode digit and minus, minus signs in words (negative 5), fractions (3/4, 1 1/2,
\frac{3}{4}, ½), powers of ten (7.2e3, 7.2 x 10^3), "72 dollars and 50 cents", and a point or comma
before decimals where another mark separates thousands (1.234,50 and 1 234,50). One point or comma
is read as English does: 70.000 is 70, and 7,5 is two numbers. The exponent of a unit (m^2, ft2) is
no number.

Words that scale are not read: GSM8K's questions that speak of millions mostly ask "in millions", so
that 4 is the gold number of "4 million". Numbers in words are not read either, for "one" and "half"
are words before they are numbers.
"""

import html
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

Value = Decimal | Fraction


class Number(NamedTuple):
    """One number of a text.

    Attributes:
        value: with its sign.
        start, end: the offsets of the number, with its sign and currency, in `plain(text)`.
    """

    value: Value
    start: int
    end: int


_THIN = "\N{THIN SPACE}"  # stands for every space that is not the keyboard's
_MINUS = "‐‑‒–—―−﹘﹣➖"
_APOSTROPHES = "‘’ʼ′"
_CURRENCY = r"(?:(?:[A-Z]{0,3}[$€£¥₹₩₽₺₫₦¢]{1,3}|[A-Z]{3}|Rs\.?)[ \u2009]?)?"
# After a letter, digit, ")", "]", "}" or "%", a sign is a subtraction or a hyphen, not a sign.
_SIGN = r"(?:(?<![\w.)\]}%])[-+])?"
_FRAC = r"\\(?:[dtcs]|nice)?frac"
_DIGIT_NEXT = r"(?=[$€£]?\d)"
_EXPONENT = r"(?:\{ *[-+]?\d+ *\}|[-+]?\d+)"
_COINED = r"(?:dollar|euro|pound)"
_WHOLE = r"\d{1,15}(?:,\d{3})*"
_MONEY = rf"((?<![\d.,])(?:[$€£] ?{_WHOLE}|{_WHOLE}(?= {_COINED})))(?: {_COINED}s?)?(?: and)?"
_WRITTEN = (  # what is rewritten before numbers are looked for, in this order
    (re.compile(r"(?:\\(?:text|mathrm|mathord|mathpunct))?\{([-+,]|\\[,;:!$]|\\? |~)\}"), r"\1"),
    (re.compile(r"\{,\\!\}"), ","),
    (re.compile(r"\\!|\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[,;: ]|\\(?:thin|med|thick)space(?![a-zA-Z])|(?<=\d)~(?=\d)"), _THIN),
    (re.compile(r"\\(?=[$%#&_€£])"), ""),
    (re.compile(rf"(?<![-+])(?={_FRAC})"), " "),  # 1\frac12 is 1 1/2; -\frac12 keeps its sign
    (re.compile(_FRAC + r" *\{ *(\d+) *\} *\{ *(\d+) *\}"), r"\1/\2"),
    (re.compile(_FRAC + r" *(\d) *(\d)"), r"\1/\2"),
    (re.compile(rf"(?<=[A-Za-z)\]}}$])(?:\^|<sup>) *{_EXPONENT}"), ""),
    (re.compile(r"(?<=\d)( ?)(mm|cm|km|m|in|ft|yd|mi)[23](?!\w)"), r"\1\2"),
    (re.compile(rf"= *- +{_DIGIT_NEXT}"), "= -"),
    (re.compile(rf"\bnegative +{_DIGIT_NEXT}", re.IGNORECASE), "-"),
    (
        re.compile(rf"((?:\A|[=:]|\b(?:is|are|equals)) *)minus +{_DIGIT_NEXT}", re.IGNORECASE),
        r"\1-",
    ),
    (re.compile(rf"{_MONEY} (\d\d) (?:cents?|pence)\b"), r"\1.\2"),
    (re.compile(rf"{_MONEY} (\d) (?:cents?|pence)\b"), r"\1.0\2"),
)
_SUPERSCRIPT = re.compile("(?<=10)[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# 3/4 and 1 1/2, but no date (1/2/2020) and no division by zero
_FRACTION = r"""
    (?<![\d./]) (?:(?P<whole>\d{1,15})[ \u2009]+)?
    (?P<over>\d{1,15})/(?P<under>(?!0+(?!\d))\d{1,15}) (?![\d/]|\.\d)
    |"""
_DECIMAL = r"\d{1,15}(?:\.\d{1,15})?"
_TIMES = rf"[ {_THIN}]*(?:[x*×·⋅]|\\times|\\cdot)[ {_THIN}]*"
# 7.2e3, 7.2 x 10^{3} and 10^3
_POWER = rf"""
    (?P<mantissa>{_DECIMAL}) [eE](?P<exponent>[-+]?\d{{1,3}}) (?!\w|\.\d)
    | (?:(?P<factor>{_DECIMAL}){_TIMES})? 10[ ]?\^[ ]?[{{(]?(?P<power>[-+]?\d{{1,3}})(?!\d)[}})]?
    |"""
# 1.234.567 and 1.234,50
_POINTS = r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?(?!\d) | \d{1,3}(?:\.\d{3})+,\d{1,2}(?!\d)"
# 1 234,50
_SPACED = rf"(?<!\d[ ])\d{{1,3}}(?P<space>[ {_THIN}'])\d{{3}}(?:(?P=space)\d{{3}})*,\d\d?(?!\d)"
_PLAIN = rf"""
    \d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d|,\d) (?:\.\d+)?  # 1,00,000
    | \d{{1,3}}(?P<separator>,{_THIN}?|[{_THIN}'_])\d{{3}}(?:(?P=separator)\d{{3}})*(?!\d)
        (?:\.\d+)?
    | (?<!\d[ ])\d{{1,3}}(?:[ ]\d{{3}})+(?![ ]?\d) (?:\.\d+)?  # 1 000, but no list of numbers
    | \d*\.\d+
    | \d+"""
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}) {_CURRENCY} (?:{_FRACTION} {_POWER} (?P<points>{_POINTS})"
    rf"| (?P<spaced>{_SPACED}) | (?P<plain>{_PLAIN}))",
    re.VERBOSE,
)
_SEPARATORS = re.compile(rf"[,{_THIN}'_ ]")


def plain(text: str) -> str:
    r"""The text with ASCII digits, signs and separators; LaTeX's spacing and HTML's entities go.

    Spaces that are not the keyboard's, LaTeX's \, among them, become thin spaces.
    """
    if "&" in text:
        text = html.unescape(text)
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = text.translate({ord(c): _ascii(c) for c in set(text) if not c.isascii()})
    for pattern, by in _WRITTEN:
        text = pattern.sub(by, text)
    return text


def numbers(plain_text: str) -> Iterator[Number]:
    """The numbers of a text that `plain` returned, from left to right."""
    for match in _NUMBER.finditer(plain_text):
        value = _value(match)
        yield Number(-value if match["sign"] == "-" else value, match.start(), match.end())


def parse_number(text: str) -> Value | None:
    """The value of the last number in a text, with its sign; None if there is no number."""
    found = list(numbers(plain(text)))
    return found[-1].value if found else None


def _value(match: re.Match[str]) -> Value:
    """The value without its sign."""
    if match["plain"]:
        return Decimal(_SEPARATORS.sub("", match["plain"]))
    if match["points"]:
        return Decimal(match["points"].replace(".", "").replace(",", "."))
    if match["spaced"]:
        whole, _, decimals = match["spaced"].rpartition(",")
        return Decimal(f"{_SEPARATORS.sub('', whole)}.{decimals}")
    if match["exponent"] or match["power"]:
        mantissa = match["mantissa"] or match["factor"] or "1"
        return Decimal(f"{mantissa}e{match['exponent'] or match['power']}")
    return int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))


def _ascii(char: str) -> str:
    """What a character beyond ASCII stands for in a number; itself if for nothing."""
    if char in _MINUS:
        return "-"
    if char in _APOSTROPHES:
        return "'"
    if "！" <= char <= "～":  # the full-width forms of ASCII
        return chr(ord(char) - 0xFEE0)
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "Zs":
        return _THIN
    if kind == "Cf":  # invisible: zero-width spaces, marks of direction
        return ""
    if kind == "No" and "\N{FRACTION SLASH}" in (form := unicodedata.normalize("NFKC", char)):
        return " " + form.replace("\N{FRACTION SLASH}", "/")
    return {"⁄": "/", "∕": "/", "٬": ",", "٫": ".", "﹩": "$", "﹪": "%"}.get(char, char)
