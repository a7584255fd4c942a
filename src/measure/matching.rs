//! Phrases in texts: which of a list stands first, and where.
//!
//! One automaton per list. A text is brought into the list's form in a buffer that stays in the core's cache (a text
//! taken as it is is not copied at all), then searched once; texts of ASCII alone never see a Unicode table.

use crate::par;
use crate::simd::{Kernel, dispatch};
use crate::{Error, Result};
use aho_corasick::{AhoCorasick, AhoCorasickBuilder, Match, MatchKind, packed};
use memchr::memmem;
use unicode_normalization::char::{canonical_combining_class, decompose_compatible};

/// In what form phrases and texts are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Exact,
    /// Lower case of Unicode, as `str.lower` of Python gives it.
    Lower,
    /// See [`fold`].
    Folded,
}

/// Where a phrase has to stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Anywhere,
    /// At the beginning; with `trim`, after white space.
    Prefix {
        trim: bool,
    },
    /// Beginning within the first words: fewer than this many before it.
    Words(usize),
    /// Within the first characters.
    Chars(usize),
}

/// What one text holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Index of the phrase; where it begins and ends, in characters of the text.
    Phrase {
        index: usize,
        start: usize,
        end: usize,
    },
    Nothing,
    /// Nothing but white space.
    Blank,
}

enum Search {
    /// SIMD search for the first bytes of all phrases at once, for up to some dozen phrases. The automaton's own choice
    /// among its accelerations would search for single first letters, which lower-case text is full of.
    Packed(Box<packed::Searcher>),
    Automaton(AhoCorasick),
}

/// A list of phrases, ready to search.
pub struct Matcher {
    search: Search,
    phrases: Vec<String>,
    longest: usize,
    form: Form,
    place: Place,
}

impl Matcher {
    /// Of phrases that begin at the same place, the one listed first is found.
    ///
    /// # Errors
    /// No phrases, more than `i32` can count, or one that is empty in this form.
    pub fn new<S: AsRef<str>>(phrases: &[S], form: Form, place: Place) -> Result<Self> {
        if phrases.is_empty() || phrases.len() > i32::MAX as usize {
            return Err(Error::value(
                "phrases",
                "at least one phrase",
                phrases.len(),
            ));
        }
        let mut scratch = Vec::new();
        let mut kept = Vec::with_capacity(phrases.len());
        for (i, p) in phrases.iter().enumerate() {
            let own = formed(p.as_ref(), form, &mut scratch);
            // A phrase may ask for a space at its end ("As an "); only what folds to nothing has no meaning.
            if own.trim().is_empty() {
                return Err(Error::value(
                    "phrases",
                    "phrases with text",
                    format!("{:?} at index {i}", p.as_ref()),
                ));
            }
            kept.push(own.to_owned());
        }
        let packed = packed::Config::new()
            .match_kind(packed::MatchKind::LeftmostFirst)
            .builder()
            .extend(&kept)
            .build();
        let search = match packed {
            Some(found) => Search::Packed(Box::new(found)),
            None => Search::Automaton(
                AhoCorasickBuilder::new()
                    .match_kind(MatchKind::LeftmostFirst)
                    .build(&kept)
                    .map_err(|e| Error::value("phrases", "phrases that fit an automaton", e))?,
            ),
        };
        let longest = kept.iter().map(String::len).max().unwrap_or(0);
        Ok(Self {
            search,
            phrases: kept,
            longest,
            form,
            place,
        })
    }

    /// The phrase that begins first in `text`.
    pub fn find(&self, text: &str, scratch: &mut Vec<u8>) -> Found {
        if text.trim_start().is_empty() {
            return Found::Blank;
        }
        let seen = match self.place {
            Place::Chars(n) => text
                .char_indices()
                .nth(n)
                .map_or(text, |(at, _)| &text[..at]),
            _ => text,
        };
        let hit = match self.place {
            Place::Anywhere | Place::Chars(_) => self.first(formed(seen, self.form, scratch)),
            Place::Prefix { .. } | Place::Words(_) => self.opening(seen, scratch),
        };
        let Some((index, start, end)) = hit else {
            return Found::Nothing;
        };
        let (start, end) = origin(seen, self.form, start, end);
        Found::Phrase { index, start, end }
    }

    /// As [`Matcher::find`] for many texts, in parallel; None stays None.
    pub fn find_all(&self, texts: &[Option<&str>]) -> Vec<Option<Found>> {
        let mut items = Vec::new();
        let (mut begin, mut bytes, mut total) = (0, 0, 0);
        for (i, text) in texts.iter().enumerate() {
            // A text costs some time however short it is.
            let size = text.map_or(0, str::len) + 64;
            bytes += size;
            total += size;
            if bytes >= par::ITEM_BYTES || i + 1 == texts.len() {
                items.push(&texts[begin..=i]);
                (begin, bytes) = (i + 1, 0);
            }
        }
        let parts = par::map(total, items, |part: &[Option<&str>]| {
            let mut scratch = Vec::new();
            part.iter()
                .map(|text| text.map(|t| self.find(t, &mut scratch)))
                .collect::<Vec<_>>()
        });
        parts.concat()
    }

    fn first(&self, text: &str) -> Option<(usize, usize, usize)> {
        let spot = |m: Match| (m.pattern().as_usize(), m.start(), m.end());
        match &self.search {
            Search::Packed(s) => s.find(text).map(spot),
            Search::Automaton(a) => a.find(text).map(spot),
        }
    }

    /// The places that need the beginning of a text alone: no more of it is brought into form than decides.
    fn opening(&self, text: &str, scratch: &mut Vec<u8>) -> Option<(usize, usize, usize)> {
        let mut size = 64 + 2 * self.longest;
        if let Place::Words(n) = self.place {
            size += 8 * n;
        }
        loop {
            let whole = size >= text.len();
            let part = if whole {
                text
            } else {
                &text[..floor(text, size)]
            };
            let own = formed(part, self.form, scratch);
            // A mark that follows the cut may still change the last characters, so their form does not count.
            let sure = if whole {
                own.len()
            } else {
                own.len().saturating_sub(64)
            };
            let (found, needed) = match self.place {
                Place::Prefix { trim } => {
                    let skip = if trim {
                        own.len() - own.trim_start().len()
                    } else {
                        0
                    };
                    let rest = &own.as_bytes()[skip..];
                    let hit = self.phrases.iter().enumerate();
                    let hit = hit
                        .filter(|(_, p)| rest.starts_with(p.as_bytes()))
                        .map(|(i, p)| (i, skip, skip + p.len()));
                    (hit.take(1).next(), skip + self.longest)
                }
                Place::Words(n) => {
                    let limit = nth_word(own, n);
                    let hit = self.first(own).filter(|h| limit.is_none_or(|l| h.1 <= l));
                    (
                        hit,
                        limit.map_or(usize::MAX, |l| l.saturating_add(self.longest)),
                    )
                }
                Place::Anywhere | Place::Chars(_) => unreachable!("searched whole"),
            };
            if whole || needed <= sure {
                return found;
            }
            size *= 4;
        }
    }
}

/// The largest character boundary up to `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at)
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0)
}

/// Where the `n`-th word (from 1) begins: the last place with fewer than `n` words before it.
fn nth_word(text: &str, n: usize) -> Option<usize> {
    if n == 0 {
        return Some(0);
    }
    let mut inside = false;
    let mut words = 0;
    for (at, c) in text.char_indices() {
        let space = c.is_whitespace();
        if !space && !inside {
            words += 1;
            if words == n {
                return Some(at);
            }
        }
        inside = !space;
    }
    None
}

/// `text` in `form`; in `scratch` unless it is itself.
fn formed<'a>(text: &'a str, form: Form, scratch: &'a mut Vec<u8>) -> &'a str {
    match form {
        Form::Exact => text,
        Form::Lower if text.is_ascii() => {
            scratch.resize(text.len(), 0);
            dispatch(Lower(text.as_bytes(), scratch));
            text_of(scratch)
        }
        Form::Lower => {
            *scratch = text.to_lowercase().into_bytes();
            text_of(scratch)
        }
        Form::Folded => {
            fold_into(text, scratch);
            text_of(scratch)
        }
    }
}

fn text_of(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("forms of a text are texts")
}

struct Lower<'a>(&'a [u8], &'a mut [u8]);

impl Kernel for Lower<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (a, b) in self.0.iter().zip(self.1) {
            *b = a.to_ascii_lowercase();
        }
    }
}

struct FoldAscii<'a>(&'a [u8], &'a mut [u8]);

impl Kernel for FoldAscii<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (a, b) in self.0.iter().zip(self.1) {
            let space = a.wrapping_sub(9) < 5;
            let lower = a.to_ascii_lowercase();
            let quote = if lower == b'`' { b'\'' } else { lower };
            *b = if space { b' ' } else { quote };
        }
    }
}

/// The text as refusals are compared in it.
///
/// In this order: typographic apostrophes, quotation marks, dashes and spaces become those of ASCII; what Unicode says
/// to ignore where it has no glyph (zero-width and bidirectional controls, soft hyphens, variation selectors, tags) is
/// left out; every character is decomposed as in NFKD (equal to NFKC for comparing: full-width and mathematical
/// letters, ligatures, circled letters); lower case; letters of Cyrillic, Greek, Armenian and Latin that look like one
/// of ASCII become it; runs of white space become one space, none at the beginning.
pub fn fold(text: &str) -> String {
    let mut out = Vec::new();
    fold_into(text, &mut out);
    String::from_utf8(out).expect("folded text is text")
}

fn fold_into(text: &str, out: &mut Vec<u8>) {
    out.clear();
    let bytes = text.as_bytes();
    let mut at = 0;
    let mut pending = Marks::default();
    while at < bytes.len() {
        let ascii = ascii_run(&bytes[at..]);
        if ascii > 0 {
            pending.flush(|c| push(out, c));
            let begin = out.len();
            out.resize(begin + ascii, 0);
            dispatch(FoldAscii(&bytes[at..at + ascii], &mut out[begin..]));
            at += ascii;
        }
        for c in text[at..].chars().take_while(|c| !c.is_ascii()) {
            fold_char(c, |d| pending.take(d, |c| push(out, c)));
            at += c.len_utf8();
        }
    }
    pending.flush(|c| push(out, c));
    squeeze(out);
}

fn push(out: &mut Vec<u8>, c: char) {
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// Bytes of ASCII at the beginning.
fn ascii_run(bytes: &[u8]) -> usize {
    // Whole texts and long stretches by the fast test of the standard library, the rest byte by byte.
    const BLOCK: usize = 64;
    if bytes.is_ascii() {
        return bytes.len();
    }
    let blocks = bytes
        .chunks_exact(BLOCK)
        .take_while(|b| b.is_ascii())
        .count()
        * BLOCK;
    blocks + bytes[blocks..].iter().take_while(|b| b.is_ascii()).count()
}

/// Runs of spaces become one, those at the beginning none; in place.
fn squeeze(out: &mut Vec<u8>) {
    let lead = out.iter().take_while(|b| **b == b' ').count();
    let double = memmem::find(&out[lead..], b"  ").map(|d| lead + d);
    if lead == 0 && double.is_none() {
        return;
    }
    let finder = memmem::Finder::new(b"  ");
    let (mut read, mut write) = (lead, 0);
    let mut next = double;
    while let Some(d) = next {
        // Up to and with the first space of the run.
        out.copy_within(read..=d, write);
        write += d + 1 - read;
        read = d + 1 + out[d + 1..].iter().take_while(|b| **b == b' ').count();
        next = finder.find(&out[read..]).map(|d| read + d);
    }
    let end = out.len();
    out.copy_within(read..end, write);
    out.truncate(write + end - read);
}

/// Combining marks wait until their run is complete, to come out in canonical order.
#[derive(Default)]
struct Marks(Vec<(u8, char)>);

impl Marks {
    #[inline]
    fn take(&mut self, c: char, mut push: impl FnMut(char)) {
        let class = canonical_combining_class(c);
        if class == 0 {
            self.flush(&mut push);
            push(c);
        } else {
            self.0.push((class, c));
        }
    }

    #[inline]
    fn flush(&mut self, mut push: impl FnMut(char)) {
        if !self.0.is_empty() {
            self.0.sort_by_key(|m| m.0);
            self.0.drain(..).for_each(|m| push(m.1));
        }
    }
}

fn fold_char(c: char, mut push: impl FnMut(char)) {
    match c {
        _ if ignorable(c) => {}
        // Han: no case, no decomposition, and long runs of it.
        '\u{4e00}'..='\u{9fff}' => push(c),
        _ => match punctuation(c) {
            // It would decompose to a space and a mark, or not at all.
            Some(p) => push(p),
            None => decompose_compatible(c, |d| {
                for l in d.to_lowercase().filter(|l| !ignorable(*l)) {
                    push(punctuation(l).unwrap_or_else(|| look_alike(l)));
                }
            }),
        },
    }
}

/// The space, apostrophe, quotation mark or dash of ASCII that stands for this one.
fn punctuation(c: char) -> Option<char> {
    match c {
        '\u{2018}'..='\u{201b}' | 'ʹ' | 'ʻ' | 'ʼ' | 'ʽ' | 'ˈ' | '´' | '′' | '‵' | '＇' | '｀' => {
            Some('\'')
        }
        '\u{201c}'..='\u{201f}' | '«' | '»' | '″' | '〝' | '〞' | '＂' => Some('"'),
        '\u{2010}'..='\u{2015}' | '−' | '﹘' | '﹣' | '－' => Some('-'),
        _ => c.is_whitespace().then_some(' '),
    }
}

/// Default_Ignorable_Code_Point of Unicode, in as far as characters are assigned.
fn ignorable(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}')
}

/// The ASCII letter that a lower-case letter looks like, in this case or as a capital.
///
/// Cyrillic and Greek phrases go through the same table, so they are still found whatever their case.
fn look_alike(c: char) -> char {
    match c {
        '`' => '\'',
        'а' | 'α' | 'ɑ' => 'a',
        'в' | 'β' => 'b',
        'с' | 'ϲ' => 'c',
        'ԁ' => 'd',
        'е' | 'ε' | 'ҽ' => 'e',
        'ɡ' | 'ց' => 'g',
        'н' | 'η' | 'һ' | 'հ' => 'h',
        'і' | 'ι' | 'ı' | 'ɩ' | 'ӏ' => 'i',
        'ј' | 'ϳ' | 'յ' => 'j',
        'к' | 'κ' => 'k',
        'м' | 'μ' => 'm',
        'ո' => 'n',
        'о' | 'ο' | 'օ' | 'ᴏ' => 'o',
        'р' | 'ρ' => 'p',
        'ԛ' | 'զ' => 'q',
        'ѕ' => 's',
        'т' | 'τ' => 't',
        'υ' | 'ս' => 'u',
        'ν' | 'ѵ' => 'v',
        'ԝ' => 'w',
        'х' | 'χ' => 'x',
        'у' | 'γ' => 'y',
        'ζ' => 'z',
        'ς' => 'σ',
        _ => c,
    }
}

/// Characters of `text` that made the bytes `start..end` of its form: the first one, and the one after the last.
fn origin(text: &str, form: Form, start: usize, end: usize) -> (usize, usize) {
    if form != Form::Folded && text.is_ascii() {
        return (start, end);
    }
    if form == Form::Exact {
        let first = text[..start].chars().count();
        return (first, first + text[start..end].chars().count());
    }
    if text.is_ascii() {
        return ascii_origin(text.as_bytes(), start, end);
    }
    // One entry per byte of the form: the character it came from.
    let from = match form {
        Form::Lower => lower_origins(text),
        _ => fold_origins(text).1,
    };
    (from[start], from[end - 1] + 1)
}

/// As [`origin`] for folded ASCII, where only white space is left out.
fn ascii_origin(text: &[u8], start: usize, end: usize) -> (usize, usize) {
    let (mut made, mut spaced, mut first) = (0, true, 0);
    for (i, b) in text.iter().enumerate() {
        let space = b.is_ascii_whitespace() || *b == 0x0b;
        if space && spaced {
            continue;
        }
        spaced = space;
        if made == start {
            first = i;
        }
        made += 1;
        if made == end {
            return (first, i + 1);
        }
    }
    (first, text.len())
}

fn lower_origins(text: &str) -> Vec<usize> {
    let mut from = Vec::with_capacity(text.len());
    for (i, c) in text.chars().enumerate() {
        // The final form of sigma, which needs the neighbours, is as long as the other.
        from.extend(std::iter::repeat_n(
            i,
            c.to_lowercase().map(char::len_utf8).sum(),
        ));
    }
    from
}

/// [`fold`] character by character, with the character that each byte came from.
fn fold_origins(text: &str) -> (String, Vec<usize>) {
    let mut chars: Vec<(char, usize)> = Vec::with_capacity(text.len());
    for (i, c) in text.chars().enumerate() {
        if c.is_ascii() {
            let space = c.is_whitespace();
            chars.push((
                if space {
                    ' '
                } else {
                    look_alike(c.to_ascii_lowercase())
                },
                i,
            ));
        } else {
            fold_char(c, |d| chars.push((d, i)));
        }
    }
    let mut run = 0;
    while run < chars.len() {
        let class = |k: usize| canonical_combining_class(chars[k].0);
        let stop = (run..chars.len())
            .find(|k| class(*k) == 0)
            .unwrap_or(chars.len());
        chars[run..stop].sort_by_key(|m| canonical_combining_class(m.0));
        run = stop + 1;
    }
    let (mut out, mut from) = (String::new(), Vec::new());
    for (c, i) in chars {
        if c == ' ' && (out.is_empty() || out.ends_with(' ')) {
            continue;
        }
        out.push(c);
        from.extend(std::iter::repeat_n(i, c.len_utf8()));
    }
    (out, from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(phrases: &[&str], form: Form, place: Place, text: &str) -> Found {
        Matcher::new(phrases, form, place)
            .unwrap()
            .find(text, &mut Vec::new())
    }

    fn at(index: usize, start: usize, end: usize) -> Found {
        Found::Phrase { index, start, end }
    }

    #[test]
    fn the_leftmost_phrase_and_of_those_the_first_listed() {
        let list = ["As an AI", "As an", "sorry"];
        let any = Place::Anywhere;
        assert_eq!(
            find(&list, Form::Exact, any, "Well. As an AI, sorry"),
            at(0, 6, 14)
        );
        assert_eq!(
            find(&list[1..], Form::Exact, any, "As an AI, sorry"),
            at(0, 0, 5)
        );
        assert_eq!(find(&list, Form::Exact, any, "as an ai"), Found::Nothing);
        assert_eq!(find(&list, Form::Lower, any, "é AS AN AI"), at(0, 2, 10));
        assert_eq!(find(&list, Form::Lower, any, " \n\u{3000}"), Found::Blank);
    }

    #[test]
    fn typographic_and_hidden_forms_fold_to_ascii() {
        let list = ["I'm sorry", "I cannot"];
        for text in [
            "I’m sorry",
            "I´m  sorry",
            "I`m\nsorry",
            "i\u{200b}'\u{2060}m sor\u{ad}ry",
            "Ｉ＇ｍ ｓｏｒｒｙ",
            "𝐈'𝐦 𝘀𝗼𝗿𝗿𝘆",
            "І'м ѕоrrу",
            "\u{feff} \tI'M\u{a0}\u{2003}SORRY",
        ] {
            let n = text.chars().count();
            let Found::Phrase { index, start, end } =
                find(&list, Form::Folded, Place::Anywhere, text)
            else {
                panic!("{text:?}");
            };
            assert_eq!((index, end), (0, n), "{text:?}");
            assert_eq!(
                text.chars().nth(start).map(|c| fold(&c.to_string())),
                Some("i".into())
            );
        }
        assert_eq!(fold("“Ab” – ﬁ…  ½"), "\"ab\" - fi... 1⁄2");
    }

    #[test]
    fn canonical_equivalents_fold_alike() {
        for (a, b) in [
            ("é", "e\u{301}"),
            ("ệ", "ê\u{323}"),
            ("ệ", "ẹ\u{302}"),
            ("한", "한"),
        ] {
            assert_eq!(fold(a), fold(b));
        }
        // Marks over an ASCII letter, and capitals of scripts with look-alikes.
        assert_eq!(fold("x\u{302}\u{323}"), fold("x\u{323}\u{302}"));
        assert_eq!(fold("НЕ МОГУ"), fold("не могу"));
    }

    #[test]
    fn openings() {
        let list = ["I cannot", "Sorry"];
        let prefix = |trim| Place::Prefix { trim };
        let long = format!("{}I cannot", " ".repeat(5000));
        assert_eq!(
            find(&list, Form::Exact, prefix(true), &long),
            at(0, 5000, 5008)
        );
        assert_eq!(
            find(&list, Form::Exact, prefix(false), &long),
            Found::Nothing
        );
        assert_eq!(
            find(&list, Form::Folded, prefix(false), &long),
            at(0, 5000, 5008)
        );
        assert_eq!(
            find(&list, Form::Exact, prefix(true), "No. Sorry"),
            Found::Nothing
        );
        let text = "one two  three Sorry";
        assert_eq!(
            find(&list, Form::Exact, Place::Words(4), text),
            at(1, 15, 20)
        );
        assert_eq!(
            find(&list, Form::Exact, Place::Words(3), text),
            Found::Nothing
        );
        assert_eq!(
            find(&list, Form::Exact, Place::Chars(20), text),
            at(1, 15, 20)
        );
        assert_eq!(
            find(&list, Form::Exact, Place::Chars(19), text),
            Found::Nothing
        );
        let far = format!("{}Sorry", "word ".repeat(3000));
        assert_eq!(
            find(&list, Form::Folded, Place::Words(3001), &far),
            at(1, 15000, 15005)
        );
        assert_eq!(
            find(&list, Form::Folded, Place::Words(3000), &far),
            Found::Nothing
        );
    }

    #[test]
    fn more_phrases_than_the_packed_search_takes() {
        let list: Vec<String> = (0..500).map(|i| format!("phrase number {i};")).collect();
        let m = Matcher::new(&list, Form::Lower, Place::Anywhere).unwrap();
        assert!(matches!(m.search, Search::Automaton(_)));
        let texts: Vec<String> = (0..500).map(|i| format!("Phrase NUMBER {i};")).collect();
        let shown: Vec<_> = texts.iter().map(|t| Some(t.as_str())).collect();
        for (i, found) in m.find_all(&shown).into_iter().enumerate() {
            assert!(matches!(found, Some(Found::Phrase { index, .. }) if index == i));
        }
    }

    #[test]
    fn bad_lists() {
        for list in [&[][..], &["a", ""], &["a", " \u{200b}"]] {
            assert!(Matcher::new(list, Form::Folded, Place::Anywhere).is_err());
        }
    }

    /// What the matcher must find, from the definition.
    fn plain(phrases: &[String], form: Form, place: Place, text: &str) -> Option<(usize, usize)> {
        let shape = |t: &str| match form {
            Form::Exact => t.to_owned(),
            Form::Lower => t.to_lowercase(),
            Form::Folded => fold_origins(t).0,
        };
        let text = match place {
            Place::Chars(n) => text.chars().take(n).collect(),
            _ => text.to_owned(),
        };
        let own = shape(&text);
        let skip = match place {
            Place::Prefix { trim: true } => own.len() - own.trim_start().len(),
            _ => 0,
        };
        own.char_indices().map(|(at, _)| at).find_map(|at| {
            let allowed = match place {
                Place::Prefix { .. } => at == skip,
                Place::Words(n) => own[..at].split_whitespace().count() < n,
                _ => true,
            };
            let hit = phrases
                .iter()
                .position(|p| own[at..].starts_with(&shape(p)));
            hit.filter(|_| allowed).map(|i| (i, at))
        })
    }

    proptest! {
        #[test]
        fn fold_is_the_same_by_both_routes(text in "([a-z `\n]|[àệŋΣßİﬁ’…\u{200b}\u{301}\u{323}\u{3000}Аа]|\\PC){0,80}") {
            let (slow, from) = fold_origins(&text);
            prop_assert_eq!(fold(&text), slow.clone());
            prop_assert_eq!(from.len(), slow.len());
            prop_assert_eq!(fold(&slow), slow.clone(), "folding again changes nothing");
        }

        #[test]
        fn matches_are_those_of_the_definition(
            phrases in prop::collection::vec("[abAB’' é]{0,2}[abB’é]", 1..5),
            text in "[abAB’'` é\n\u{200b}]{0,40}",
            form in prop::sample::select(vec![Form::Exact, Form::Lower, Form::Folded]),
            place in prop::sample::select(vec![
                Place::Anywhere, Place::Prefix { trim: true }, Place::Prefix { trim: false },
                Place::Words(2), Place::Chars(5),
            ]),
        ) {
            let found = find(&phrases.iter().map(String::as_str).collect::<Vec<_>>(), form, place, &text);
            let wanted = plain(&phrases, form, place, &text);
            match found {
                Found::Blank => prop_assert!(text.trim().is_empty()),
                Found::Nothing => prop_assert_eq!(wanted, None),
                Found::Phrase { index, start, end } => {
                    let (i, at) = wanted.expect("nothing to find");
                    prop_assert_eq!(index, i);
                    let chars: Vec<char> = text.chars().collect();
                    let own: String = chars[start..end].iter().collect();
                    let shape = |t: &str| match form {
                        Form::Exact => t.to_owned(),
                        Form::Lower => t.to_lowercase(),
                        Form::Folded => fold(t),
                    };
                    // The span is the phrase, but for a space at its beginning, which folding drops at an edge.
                    prop_assert_eq!(shape(&own).trim().to_owned(), shape(&phrases[i]).trim().to_owned());
                    let _ = at;
                }
            }
        }
    }
}
