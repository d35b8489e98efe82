"""Words and sentences for filters and shingles, without a model that would have to be downloaded."""

import regex
from datatrove.utils.word_tokenizers import WordTokenizer

# Scripts that put no space between words: each character counts as one.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w])+(?:['’](?:(?![{_UNSPACED}])\w)+)*|[^\w\s]")
_SENTENCE = regex.compile(r".+?(?:[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]|\n|$)", regex.DOTALL)


class Words(WordTokenizer):
    """Words as runs of letters and digits, marks one by one; sentences end with a mark or a line.

    datatrove's own choices need spaCy or models of NLTK; the counts that its filters make differ little by the tool.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """The words and marks of a text."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of a text, without the space around them."""
        return [sentence for _, _, sentence in self._sentences(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where each sentence begins and ends."""
        return [(start, end) for start, end, _ in self._sentences(text)]

    def _sentences(self, text: str) -> list[tuple[int, int, str]]:
        found = ((match.start(), match.end(), match[0].strip()) for match in _SENTENCE.finditer(text))
        return [(start, end, sentence) for start, end, sentence in found if sentence]


WORDS = Words()
