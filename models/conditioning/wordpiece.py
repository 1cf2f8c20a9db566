"""WordPiece, text to token numbers as in BERT: clean, lower-case, strip accents, split at punctuation, then WordPiece.

Devlin et al. 2019 (arXiv:1810.04805); the longest-match rule is Wu et al. 2016 (arXiv:1609.08144), section 4.1.
Only the vocabulary file is needed.
"""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

_LONGEST_WORD = 100  # characters; longer ones are unknown, as in the original

# Chinese characters are words of their own.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """An uncased BERT vocabulary."""

    def __init__(self, vocabulary: Path) -> None:
        """``vocabulary`` has one token a line; its number is that of the line, from 0."""
        tokens = vocabulary.read_text(encoding="utf-8").split("\n")
        self.numbers = {token.rstrip("\r"): number for number, token in enumerate(tokens) if token}
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        if missing := [token for token in special if token not in self.numbers]:
            raise ValueError(f"{vocabulary} is not the vocabulary of a BERT: it lacks {missing}")
        self.padding, self.unknown, self.start, self.end = (self.numbers[token] for token in special)

    def encode(self, text: str, *, length: int) -> list[int]:
        """Exactly ``length`` (at least 2) token numbers: start, the text as far as it fits, end, padding."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)][: length - 2]
        numbers = [self.start, *pieces, self.end]
        return numbers + [self.padding] * (length - len(numbers))

    def _pieces(self, word: str) -> list[int]:
        """The longest known beginning of ``word``, then the longest of what is left, and so on."""
        if len(word) > _LONGEST_WORD:
            return [self.unknown]
        pieces = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                number = self.numbers.get(prefix + word[start:end])
                if number is not None:
                    break
            else:
                return [self.unknown]
            pieces.append(number)
            start = end
        return pieces


def _words(text: str) -> Iterator[str]:
    """Lower-case words without accents, and punctuation marks and ideographs each by itself."""
    word = ""
    for character in _normalised(text):
        alone = _is_punctuation(character) or _is_ideograph(character)
        if alone or character.isspace():
            if word:
                yield word
            word = ""
        if alone:
            yield character
        elif not character.isspace():
            word += character
    if word:
        yield word


def _normalised(text: str) -> str:
    cleaned = "".join(
        " " if _is_space(character) else character
        for character in text
        if _is_space(character) or not _is_control(character)
    )
    decomposed = unicodedata.normalize("NFD", cleaned)
    # Letter by letter: as a string, a Greek word would end in another sigma.
    return "".join(character.lower() for character in decomposed if unicodedata.category(character) != "Mn")


def _is_space(character: str) -> bool:
    return character in "\t\n\r" or unicodedata.category(character) == "Zs"


def _is_control(character: str) -> bool:
    return character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")


def _is_punctuation(character: str) -> bool:
    # All of ASCII's symbols count, though Unicode does not call $, + or ` punctuation.
    is_ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return is_ascii_symbol or unicodedata.category(character).startswith("P")


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _IDEOGRAPHS)
