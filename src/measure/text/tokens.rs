//! Texts as tokens: words or characters, with the boundaries that n-grams do not cross.
//!
//! The rules are those of scikit-learn's vectorizers. A word character is a letter, a number of any kind (categories L and
//! N) or the underscore, which is Python's `\w`: combining marks are none.

use super::intern::Strings;
use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Analyzer {
    /// Runs of at least `shortest` word characters; with `apostrophes` also what follows an apostrophe inside a word.
    Word { shortest: usize, apostrophes: bool },
    /// Characters; two and more white space characters in a row are one space.
    Char,
    /// Characters of words cut at white space, with a space on both sides; n-grams stay inside a word.
    CharWordBoundary,
}

/// How texts are cut.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    pub analyzer: Analyzer,
    pub lowercase: bool,
    /// Words left out before n-grams are formed.
    pub stop: Strings,
    /// Shortest and longest n-gram.
    pub shortest: usize,
    pub longest: usize,
}

/// Tokens of many texts, one after another. A segment is a part of a text that n-grams do not leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream {
    pub tokens: Vec<u32>,
    /// Ends of segments in `tokens`.
    pub segments: Vec<u32>,
    /// Ends of texts in `segments`.
    pub texts: Vec<u32>,
}

impl Stream {
    /// Calls `f(text, start, end)` for each segment.
    #[inline]
    pub fn for_each_segment(&self, mut f: impl FnMut(usize, usize, usize)) {
        let (mut start, mut segment) = (0, 0);
        for (text, last) in self.texts.iter().enumerate() {
            while segment < *last as usize {
                let end = self.segments[segment] as usize;
                f(text, start, end);
                start = end;
                segment += 1;
            }
        }
    }
}

/// Tokens that the table does not know, see [`Tokenizer::append`].
pub const UNKNOWN: u32 = u32::MAX;

/// Python's `\s`.
#[inline]
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

#[inline]
fn is_word(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_alphanumeric() || c == '_';
    }
    matches!(
        c.general_category_group(),
        GeneralCategoryGroup::Letter | GeneralCategoryGroup::Number
    )
}

#[inline]
fn is_apostrophe(c: char) -> bool {
    matches!(c, '\'' | '\u{2019}' | '\u{02bc}')
}

const WORD: u8 = 1;
const APOSTROPHE: u8 = 2;
const CLASS: [u8; 128] = {
    let mut table = [0; 128];
    let mut i = 0;
    while i < 128 {
        if (i as u8).is_ascii_alphanumeric() || i as u8 == b'_' {
            table[i] = WORD;
        }
        i += 1;
    }
    table[b'\'' as usize] = APOSTROPHE;
    table
};

impl Tokenizer {
    /// Whether an n-gram of `n` tokens of a segment of `segment` tokens is counted.
    #[inline(always)]
    pub fn counts(&self, n: usize, segment: usize) -> bool {
        let short_word = n == segment && n < self.shortest;
        (n >= self.shortest && n <= self.longest)
            || (short_word && self.analyzer == Analyzer::CharWordBoundary)
    }

    /// Appends the tokens of `text`: what `number` says of a word, code points of characters.
    pub fn append(&self, text: &str, to: &mut Stream, number: &mut impl FnMut(&[u8]) -> u32) {
        let lowered;
        let text = match self.lowercase {
            true => {
                lowered = match text.is_ascii() {
                    true => text.to_ascii_lowercase(),
                    false => text.to_lowercase(),
                };
                &lowered
            }
            false => text,
        };
        match self.analyzer {
            Analyzer::Word {
                shortest,
                apostrophes,
            } => {
                let mut word = |w: &[u8]| {
                    if self.stop.is_empty() || self.stop.find(w).is_none() {
                        to.tokens.push(number(w));
                    }
                };
                match text.is_ascii() {
                    true => ascii_words(text.as_bytes(), shortest, apostrophes, &mut word),
                    false => words(text, shortest, apostrophes, &mut word),
                }
                to.segments.push(to.tokens.len() as u32);
            }
            Analyzer::Char => {
                let mut run = None;
                for c in text.chars() {
                    match (is_space(c), run) {
                        (true, None) => run = Some(c),
                        (true, Some(_)) => run = Some(' '),
                        (false, _) => {
                            to.tokens.extend(run.take().map(u32::from));
                            to.tokens.push(u32::from(c));
                        }
                    }
                }
                to.tokens.extend(run.map(u32::from));
                to.segments.push(to.tokens.len() as u32);
            }
            Analyzer::CharWordBoundary => {
                for word in text.split(is_space).filter(|w| !w.is_empty()) {
                    to.tokens.push(u32::from(' '));
                    to.tokens.extend(word.chars().map(u32::from));
                    to.tokens.push(u32::from(' '));
                    to.segments.push(to.tokens.len() as u32);
                }
            }
        }
        to.texts.push(to.segments.len() as u32);
    }

    /// The tokens of an n-gram as it is written.
    pub fn parse(&self, term: &str, number: &mut impl FnMut(&[u8]) -> u32) -> Vec<u32> {
        match self.analyzer {
            Analyzer::Word { .. } => term.split(' ').map(|w| number(w.as_bytes())).collect(),
            _ => term.chars().map(u32::from).collect(),
        }
    }
}

#[inline]
fn ascii_words(text: &[u8], shortest: usize, apostrophes: bool, emit: &mut impl FnMut(&[u8])) {
    let class = |i: usize| text.get(i).map_or(0, |b| CLASS[usize::from(b & 127)]);
    let mut at = 0;
    while at < text.len() {
        if class(at) != WORD {
            at += 1;
            continue;
        }
        let start = at;
        loop {
            while class(at) == WORD {
                at += 1;
            }
            if apostrophes && class(at) == APOSTROPHE && class(at + 1) == WORD {
                at += 1;
            } else {
                break;
            }
        }
        if at - start >= shortest {
            emit(&text[start..at]);
        }
    }
}

/// As [`ascii_words`] for any text; typographic apostrophes are written as the plain one.
fn words(text: &str, shortest: usize, apostrophes: bool, emit: &mut impl FnMut(&[u8])) {
    let (mut word, mut count, mut pending) = (String::new(), 0, false);
    let mut end = |word: &mut String, count: &mut usize| {
        if *count >= shortest && !word.is_empty() {
            emit(word.as_bytes());
        }
        word.clear();
        *count = 0;
    };
    for c in text.chars() {
        if is_word(c) {
            if std::mem::take(&mut pending) {
                word.push('\'');
                count += 1;
            }
            word.push(c);
            count += 1;
        } else if apostrophes && is_apostrophe(c) && count > 0 && !pending {
            pending = true;
        } else {
            pending = false;
            end(&mut word, &mut count);
        }
    }
    end(&mut word, &mut count);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str, analyzer: Analyzer, lowercase: bool) -> Vec<Vec<String>> {
        let t = Tokenizer {
            analyzer,
            lowercase,
            stop: Strings::default(),
            shortest: 1,
            longest: 1,
        };
        let (mut stream, mut strings) = (Stream::default(), Strings::default());
        t.append(text, &mut stream, &mut |w| strings.intern(w));
        let mut out = Vec::new();
        stream.for_each_segment(|_, start, end| {
            out.push(
                stream.tokens[start..end]
                    .iter()
                    .map(|v| match analyzer {
                        Analyzer::Word { .. } => {
                            String::from_utf8(strings.get(*v).to_vec()).unwrap()
                        }
                        _ => char::from_u32(*v).unwrap().to_string(),
                    })
                    .collect(),
            );
        });
        out
    }

    #[test]
    fn words_as_pythons_regular_expression_finds_them() {
        let sklearn = Analyzer::Word {
            shortest: 2,
            apostrophes: false,
        };
        let cases: [(&str, &[&str]); 6] = [
            ("I can't help", &["can", "help"]),
            ("A_b 3x, é ÉÀ!", &["a_b", "3x", "éà"]),
            // A vowel sign is a mark, which ends a word: "की" leaves one letter, too short.
            ("हिन्दी मन", &["मन"]),
            ("²³ Ⅷ½", &["²³", "ⅷ½"]),
            ("ΟΔΟΣ", &["οδος"]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(cut(text, sklearn, true), [expected.to_vec()], "{text}");
        }
        assert_eq!(cut("Ab CD", sklearn, false), [["Ab", "CD"]]);
    }

    #[test]
    fn apostrophes_stay_inside_words() {
        let kept = Analyzer::Word {
            shortest: 1,
            apostrophes: true,
        };
        for text in [
            "I can't 'do' rock'n'roll's''x",
            "I can\u{2019}t \u{2019}do\u{2019} rock'n\u{2019}roll's'\u{2019}x",
        ] {
            assert_eq!(
                cut(text, kept, true),
                [["i", "can't", "do", "rock'n'roll's", "x"]]
            );
        }
    }

    #[test]
    fn characters_and_their_spaces() {
        let join = |v: Vec<Vec<String>>| v.iter().map(|s| s.concat()).collect::<Vec<_>>();
        assert_eq!(
            join(cut("a \t b\nc\x1c\x1d", Analyzer::Char, true)),
            ["a b\nc "]
        );
        assert_eq!(
            join(cut(" ab  Ç\n", Analyzer::CharWordBoundary, true)),
            [" ab ", " ç "]
        );
        assert!(cut(" \n", Analyzer::CharWordBoundary, true).is_empty());
    }
}
