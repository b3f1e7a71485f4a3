"""Text that tells tokenizers apart: scripts, digits, contractions, code, emoji and runs of white space."""

from __future__ import annotations

from tests.tiny import documents

TEXTS = [
    *documents("en", 6),
    *documents("ko", 6),
    "",
    " ",
    "   leading and trailing   ",
    "a  b   c    d     e          f\n\n\ng\n \n  h\t\ti\r\n\r\nj \n",
    "It's I'M we'll THEY'RE don't 'tis 's 'S 'ſ rock'n'roll",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ²³ ½ ٣٤٥ १२३ Ⅷ",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # comment\n\n\tif x != y: pass",
    'for(int i=0;i<10;++i){printf("%d\\n",i);}//…',
    "안녕하세요! 2024년 3월 1일, 가격은 ₩12,000원입니다. ㅋㅋㅋ ㅠㅠ 한국어와English가 섞인문장.",
    "대한민국헌법 제1조 ①대한민국은 민주공화국이다.",
    "😀😃 👨‍👩‍👧‍👦 🇰🇷 ❤️ ☃ 👍🏽",
    "naïve café Ünïcödé ÀÉÎ straße ŒUVRE dž Dž DŽ",
    "日本語のテキスト、中文文本。Русский текст; العربية עברית ไทย हिन्दी",
    "combining: e\u0301 n\u0303 \u1112\u1161\u11ab",
    "nbsp\u00a0here thin\u2009space ideographic\u3000space zero\u200bwidth \ufeffbom",
    "<s>special</s> and <pad> in text, <unk> too",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
    "____ ---- **** //// ==== ((( ))) [[[ ]]] ... !!! ??? \"\"\" ''' ``` ~~~",
    "\x00\x01 control \x7f characters",
    "▁ ▁▁ a▁b ▁c",
]
