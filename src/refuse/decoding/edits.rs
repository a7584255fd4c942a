//! Sparse writes into rows of logits: what to add where, checked over all rows before the first is written.

use super::{is_poison, no_token_left, poison_error, token};
use crate::element::{Element, Real};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result, par};

/// What a scattered write counts towards waking the pool. Beside a model's own threads that takes as long as thousands
/// of writes, so a write counts as no more than its element, though it moves a line.
const WRITE: usize = 4;

/// What to add to which entries, row by row; ids ascend and are unique within a row.
#[derive(Debug, Clone)]
pub struct Edits {
    indptr: Vec<usize>,
    ids: Vec<u32>,
    values: Vec<f64>,
    /// One list for every row.
    shared: bool,
}

impl Edits {
    /// Takes lists in compressed sparse row form for `rows` × `width` logits, or, without `indptr`, one list for every
    /// row. The biases of an id given twice in a row are added.
    ///
    /// # Errors
    /// `Shape` for inconsistent lengths, `Value` for an id outside the vocabulary or a bias that is NaN or +∞.
    pub fn sum(
        indptr: Option<&[i64]>,
        ids: &[i64],
        bias: &[f64],
        rows: usize,
        width: usize,
    ) -> Result<Self> {
        if ids.len() != bias.len() {
            return Err(Error::shape(
                "bias",
                format!("{} values", ids.len()),
                bias.len(),
            ));
        }
        if let Some(b) = bias.iter().find(|b| b.is_nan() || **b == f64::INFINITY) {
            return Err(Error::value("bias", "a finite number or -inf", b));
        }
        let whole = [0, ids.len() as i64];
        let starts = indptr.unwrap_or(&whole);
        if let Some(indptr) = indptr {
            check_indptr(indptr, ids.len(), rows)?;
        }
        let mut out = Self {
            indptr: vec![0],
            ids: Vec::with_capacity(ids.len()),
            values: Vec::with_capacity(ids.len()),
            shared: indptr.is_none(),
        };
        for bounds in starts.windows(2) {
            let range = bounds[0] as usize..bounds[1] as usize;
            let row: Result<Vec<_>> = ids[range.clone()]
                .iter()
                .zip(&bias[range])
                .map(|(id, b)| Ok((token("ids", *id, width)?, *b)))
                .collect();
            out.push(row?);
        }
        Ok(out)
    }

    fn push(&mut self, mut row: Vec<(u32, f64)>) {
        row.sort_by_key(|e| e.0);
        let start = self.ids.len();
        for (id, b) in row {
            match self.ids[start..].last() {
                Some(last) if *last == id => {
                    let at = self.values.len() - 1;
                    self.values[at] += b;
                }
                _ => {
                    self.ids.push(id);
                    self.values.push(b);
                }
            }
        }
        self.indptr.push(self.ids.len());
    }

    fn row(&self, i: usize) -> Row<'_> {
        let i = if self.shared { 0 } else { i };
        let range = self.indptr[i]..self.indptr[i + 1];
        Row {
            ids: &self.ids[range.clone()],
            values: &self.values[range],
        }
    }

    /// Size of the work over `rows` rows, to decide whether threads are worth waking.
    fn bytes(&self, rows: usize) -> usize {
        WRITE * self.ids.len() * if self.shared { rows } else { 1 }
    }
}

fn check_indptr(indptr: &[i64], entries: usize, rows: usize) -> Result<()> {
    if indptr.len() != rows + 1 {
        let expected = format!("{} entries (rows + 1)", rows + 1);
        return Err(Error::shape("indptr", expected, indptr.len()));
    }
    let ends = indptr[0] == 0 && indptr[rows] == entries as i64;
    if !ends || indptr.windows(2).any(|w| w[0] > w[1]) {
        return Err(Error::value(
            "indptr",
            format!("a non-decreasing list from 0 to {entries}"),
            "another",
        ));
    }
    Ok(())
}

/// The edits of one row.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub ids: &'a [u32],
    pub values: &'a [f64],
}

/// An entry after its bias, rounded to nearest even; what [`Row::write`] stores.
#[inline(always)]
pub fn biased<T: Element>(v: T, bias: f64) -> T {
    if bias == 0.0 {
        return v;
    }
    T::store(v.load() + T::Acc::from_f64(bias))
}

/// `biased` of entry `id`, or why it must not be stored.
#[inline]
pub fn check_entry<T: Element>(i: usize, row: &[T], id: u32, bias: f64) -> Result<T> {
    let v = row[id as usize];
    if is_poison(v) {
        return Err(poison_error(i, row.len(), id as usize, v));
    }
    let sum = biased(v, bias);
    if bias.is_finite() && v.finite() && !sum.finite() {
        return Err(Error::value(
            "bias",
            format!("a sum within the range of {}", T::DTYPE),
            format!("{} + {bias} at row {i}, token {id}", v.load().to_f64()),
        ));
    }
    Ok(sum)
}

/// Whether the row keeps an entry above −∞ once the `removed` ones are gone. Reads up to the first such entry.
pub fn survives<T: Element>(row: &[T], removed: impl Fn(u32) -> bool) -> bool {
    row.iter()
        .enumerate()
        .any(|(id, v)| v.load() > -T::Acc::INFINITY && !removed(id as u32))
}

/// Checks that each row has a token left, reading up to its first: a row of −∞ becomes NaN in every softmax after it.
///
/// # Errors
/// `Degenerate` with the index of the first row that has none.
pub fn expect_tokens<T: Element>(rows: &Rows<'_, T>) -> Result<()> {
    let none = |i: &usize| !rows.row(*i).iter().any(|v| v.load() != -T::Acc::INFINITY);
    match (0..rows.rows()).find(none) {
        Some(i) => Err(no_token_left(i)),
        None => Ok(()),
    }
}

impl Row<'_> {
    /// # Errors
    /// `NonFinite` for a NaN or +∞ entry, `Value` for an overflow, `Degenerate` if no token would be left.
    pub fn check<T: Element>(&self, i: usize, row: &[T]) -> Result<()> {
        let mut removes = false;
        for (id, b) in self.ids.iter().zip(self.values) {
            check_entry(i, row, *id, *b)?;
            removes |= *b == f64::NEG_INFINITY;
        }
        let gone = |id| {
            let at = self.ids.binary_search(&id);
            at.is_ok_and(|at| self.values[at] == f64::NEG_INFINITY)
        };
        if removes && !survives(row, gone) {
            return Err(no_token_left(i));
        }
        Ok(())
    }

    pub fn write<T: Element>(&self, row: &mut [T]) {
        for (id, b) in self.ids.iter().zip(self.values) {
            row[*id as usize] = biased(row[*id as usize], *b);
        }
    }
}

/// Adds to each row its biases: entries are widened, added to and rounded to nearest even once; all other entries keep
/// their bits and are not read. A bias of −∞ forbids the token.
///
/// # Errors
/// As [`Row::check`], before anything is written.
pub fn bias<T: Element>(logits: RowsMut<'_, T>, edits: &Edits) -> Result<()> {
    let bytes = edits.bytes(logits.rows());
    let view = logits.as_rows();
    par::try_map(bytes, (0..view.rows()).collect(), |i| {
        edits.row(i).check(i, view.row(i))
    })?;
    par::for_each(bytes, logits.into_runs(1), |run| {
        edits.row(run.first).write(run.data);
    });
    Ok(())
}

/// Leaves token `id` alone in the row: its value stays if it is finite, else becomes 0; all others become −∞.
pub fn force_row<T: Element>(row: &mut [T], id: u32) {
    let kept = match row[id as usize] {
        v if v.finite() => v,
        _ => T::store(T::Acc::ZERO),
    };
    row.fill(T::store(-T::Acc::INFINITY));
    row[id as usize] = kept;
}

/// [`force_row`] in each row with its id of `ids`; a negative id leaves the row as it is.
///
/// # Errors
/// `Shape` unless there is one id per row, `Value` for an id outside the vocabulary, `NonFinite` if the kept entry is
/// NaN or +∞; before anything is written.
pub fn force<T: Element>(logits: RowsMut<'_, T>, ids: &[i64]) -> Result<()> {
    let (rows, width) = (logits.rows(), logits.width());
    if ids.len() != rows {
        return Err(Error::shape(
            "ids",
            format!("{rows} (one per row)"),
            ids.len(),
        ));
    }
    let view = logits.as_rows();
    for (i, id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
        check_entry(i, view.row(i), token("ids", *id, width)?, 0.0)?;
    }
    par::for_each(rows * width * size_of::<T>(), logits.into_runs(1), |run| {
        if let Ok(id) = u32::try_from(ids[run.first]) {
            force_row(run.data, id);
        }
    });
    Ok(())
}

/// Size of `n` scattered writes, to decide whether threads are worth waking.
pub fn scattered(n: usize) -> usize {
    WRITE * n
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    const NEG: f32 = f32::NEG_INFINITY;

    fn run<T: Element>(data: &mut [T], width: usize, ids: &[i64], b: &[f64]) -> Result<()> {
        let rows = data.len() / width;
        bias(
            RowsMut::matrix(data, width),
            &Edits::sum(None, ids, b, rows, width)?,
        )
    }

    #[test]
    fn adds_rounds_once_and_leaves_the_rest() {
        let mut z = [17.25, f32::MIN_POSITIVE, -0.0].map(bf16::from_f32);
        let before = z;
        run(&mut z, 3, &[0], &[0.03]).unwrap();
        assert_eq!(z, before);
        run(&mut z, 3, &[0], &[0.0625]).unwrap();
        assert_eq!(z, before, "a tie goes to even");
        run(&mut z, 3, &[0, 0], &[0.03, 0.04]).unwrap();
        assert_eq!(z[0].to_f32(), 17.375);
        assert_eq!(z[1..], before[1..]);
        assert!(z[2].is_sign_negative(), "zero bias keeps the sign of zero");
    }

    #[test]
    fn rows_have_their_own_lists() {
        let mut z = [0f32; 6];
        let edits = Edits::sum(Some(&[0, 0, 2]), &[2, 0], &[NEG.into(), 1.5], 2, 3).unwrap();
        bias(RowsMut::matrix(&mut z, 3), &edits).unwrap();
        assert_eq!(z, [0.0, 0.0, 0.0, 1.5, 0.0, NEG]);
    }

    #[test]
    fn writes_nothing_when_one_row_is_at_fault() {
        let mut overflow = [0.0, 65000.0].map(f16::from_f32);
        let before = overflow;
        assert!(matches!(
            run(&mut overflow, 1, &[0], &[600.0]),
            Err(Error::Value { .. })
        ));
        assert_eq!(overflow, before);
        let mut nan = [0.0, f32::NAN];
        assert!(matches!(
            run(&mut nan, 1, &[0], &[1.0]),
            Err(Error::NonFinite { index: 1, .. })
        ));
        assert_eq!(nan[0], 0.0);
        let mut last = [0.0, 1.0, NEG, 2.0];
        let got = run(&mut last, 2, &[1], &[NEG.into()]);
        assert!(matches!(got, Err(Error::Degenerate { .. })));
        assert_eq!(last, [0.0, 1.0, NEG, 2.0]);
    }

    #[test]
    fn refuses_bad_lists() {
        assert!(Edits::sum(None, &[3], &[0.0], 1, 3).is_err());
        assert!(Edits::sum(None, &[-1], &[0.0], 1, 3).is_err());
        assert!(Edits::sum(None, &[0], &[f64::NAN], 1, 3).is_err());
        assert!(Edits::sum(None, &[0], &[f64::INFINITY], 1, 3).is_err());
        assert!(Edits::sum(None, &[0], &[], 1, 3).is_err());
        for indptr in [&[0i64, 1][..], &[0, 2, 1], &[1, 1, 1], &[0, 0, 2]] {
            assert!(Edits::sum(Some(indptr), &[0], &[1.0], 2, 3).is_err());
        }
    }

    #[test]
    fn forces_one_token() {
        let mut z = [1.0, 2.0, 3.0, NEG, 5.0, 6.0, 7.0, 8.0, 9.0];
        force(RowsMut::matrix(&mut z, 3), &[1, 0, -1]).unwrap();
        assert_eq!(z, [NEG, 2.0, NEG, 0.0, NEG, NEG, 7.0, 8.0, 9.0]);
        assert!(force(RowsMut::matrix(&mut z, 3), &[1, 3, -1]).is_err());
        assert!(force(RowsMut::matrix(&mut z, 3), &[1, 1]).is_err());
    }
}
