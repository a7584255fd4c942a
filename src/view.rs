//! Checked views of strided memory as rows: the last axis is contiguous, the leading axes may have any strides that
//! do not make two rows overlap.
//!
//! A view owns one slice that spans all its elements and splits it with safe code only, so a kernel gets disjoint
//! `&mut [T]` pieces, contiguous runs of rows where the layout allows, without unsafe and without copying.

use crate::error::{Error, Result};

/// Shape and strides (in elements) of an array seen as rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowLayout {
    /// Length of a row (the last axis; 1 for a 0-d array).
    pub width: usize,
    /// Number of rows.
    pub rows: usize,
    /// Leading axes as (length, stride, rows per step in logical order), outermost memory stride first.
    axes: Vec<(usize, usize, usize)>,
    /// Elements from the first to one past the last element.
    span: usize,
}

impl RowLayout {
    /// Checks `shape` and `strides` (elements) and sorts and merges the leading axes.
    ///
    /// # Errors
    /// `Layout` if the last axis is not contiguous, a stride is negative, or rows overlap.
    pub fn new(arg: &'static str, shape: &[usize], strides: &[isize]) -> Result<Self> {
        let width = shape.last().copied().unwrap_or(1);
        let lead = &shape[..shape.len().saturating_sub(1)];
        let rows: usize = lead.iter().product();
        if width == 0 || rows == 0 {
            return Ok(Self {
                width,
                rows,
                axes: Vec::new(),
                span: 0,
            });
        }
        if width > 1 && strides[shape.len() - 1] != 1 {
            return Err(Error::layout(arg, "the last axis must be contiguous"));
        }
        let mut axes = Vec::new();
        let mut step = rows;
        for (&len, &stride) in lead.iter().zip(strides) {
            step /= len;
            if len > 1 {
                let stride = usize::try_from(stride)
                    .map_err(|_| Error::layout(arg, "negative strides are not supported"))?;
                axes.push((len, stride, step));
            }
        }
        axes.sort_by_key(|a| std::cmp::Reverse(a.1));
        let mut merged: Vec<(usize, usize, usize)> = Vec::new();
        for &(len, stride, step) in &axes {
            match merged.last_mut() {
                Some(outer) if outer.1 == len * stride && outer.2 == len * step => {
                    *outer = (outer.0 * len, stride, step);
                }
                _ => merged.push((len, stride, step)),
            }
        }
        let mut span = width;
        for &(len, stride, _) in merged.iter().rev() {
            if stride < span {
                return Err(Error::layout(
                    arg,
                    "elements overlap in memory (a broadcast or sliding view)",
                ));
            }
            span += (len - 1) * stride;
        }
        Ok(Self {
            width,
            rows,
            axes: merged,
            span,
        })
    }

    /// A C-contiguous matrix of `rows` × `width`.
    pub fn contiguous(rows: usize, width: usize) -> Self {
        Self {
            width,
            rows,
            axes: if rows > 1 && width > 0 {
                vec![(rows, width, 1)]
            } else {
                Vec::new()
            },
            span: rows * width,
        }
    }

    /// Elements of memory from the first to one past the last.
    pub fn span(&self) -> usize {
        self.span
    }

    /// Rows follow each other without gaps and in logical order.
    pub fn is_contiguous(&self) -> bool {
        self.span == self.rows * self.width && self.axes.iter().all(|a| a.2 == 1)
    }

    /// First element of logical row `i`, relative to the view's first element.
    pub fn offset(&self, i: usize) -> usize {
        self.axes
            .iter()
            .map(|&(len, stride, step)| i / step % len * stride)
            .sum()
    }
}

/// Read-only rows. Overlap (a broadcast) is allowed where the layout was accepted.
#[derive(Debug, Clone)]
pub struct Rows<'a, T> {
    data: &'a [T],
    layout: RowLayout,
}

/// Writable rows.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    data: &'a mut [T],
    layout: RowLayout,
}

/// A run of rows that lie one after another in memory.
#[derive(Debug)]
pub struct Run<S> {
    /// Logical index of the first row.
    pub first: usize,
    /// `rows × width` elements.
    pub data: S,
}

fn check_span(arg: &'static str, len: usize, layout: &RowLayout) -> Result<()> {
    if len < layout.span {
        return Err(Error::shape(
            arg,
            format!("{} elements of memory", layout.span),
            len,
        ));
    }
    Ok(())
}

impl<'a, T> Rows<'a, T> {
    pub fn new(arg: &'static str, data: &'a [T], layout: RowLayout) -> Result<Self> {
        check_span(arg, data.len(), &layout)?;
        Ok(Self { data, layout })
    }

    /// A C-contiguous matrix; `data.len()` must be a multiple of `width`.
    pub fn matrix(data: &'a [T], width: usize) -> Self {
        let layout = RowLayout::contiguous(data.len().checked_div(width).unwrap_or(0), width);
        Self { data, layout }
    }

    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    pub fn width(&self) -> usize {
        self.layout.width
    }

    /// Logical row `i`.
    pub fn row(&self, i: usize) -> &'a [T] {
        let o = self.layout.offset(i);
        &self.data[o..o + self.layout.width]
    }

    /// All elements as one slice, if the rows are contiguous.
    pub fn as_contiguous(&self) -> Option<&'a [T]> {
        self.layout
            .is_contiguous()
            .then(|| &self.data[..self.layout.span])
    }
}

impl<'a, T> RowsMut<'a, T> {
    pub fn new(arg: &'static str, data: &'a mut [T], layout: RowLayout) -> Result<Self> {
        check_span(arg, data.len(), &layout)?;
        Ok(Self { data, layout })
    }

    /// A C-contiguous matrix; `data.len()` must be a multiple of `width`.
    pub fn matrix(data: &'a mut [T], width: usize) -> Self {
        let layout = RowLayout::contiguous(data.len().checked_div(width).unwrap_or(0), width);
        Self { data, layout }
    }

    pub fn rows(&self) -> usize {
        self.layout.rows
    }

    pub fn width(&self) -> usize {
        self.layout.width
    }

    /// The same rows, read-only.
    pub fn as_rows(&self) -> Rows<'_, T> {
        Rows {
            data: self.data,
            layout: self.layout.clone(),
        }
    }

    /// The same rows, writable, for less long.
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
        RowsMut {
            data: self.data,
            layout: self.layout.clone(),
        }
    }

    /// Disjoint runs of at most `max_rows` rows that cover the view. Boundaries depend on the layout alone.
    pub fn into_runs(self, max_rows: usize) -> Vec<Run<&'a mut [T]>> {
        let mut out = Vec::new();
        if self.layout.span > 0 {
            split(
                &mut out,
                &mut self.data[..self.layout.span],
                0,
                &self.layout.axes,
                self.layout.width,
                max_rows.max(1),
            );
        }
        out
    }
}

fn split<'a, T>(
    out: &mut Vec<Run<&'a mut [T]>>,
    data: &'a mut [T],
    first: usize,
    axes: &[(usize, usize, usize)],
    width: usize,
    max_rows: usize,
) {
    match axes {
        [] => out.push(Run {
            first,
            data: &mut data[..width],
        }),
        // Innermost axis without gaps: hand out runs of whole rows.
        [(len, stride, 1)] if *stride == width => {
            let runs = data[..len * width].chunks_mut(max_rows * width);
            out.extend(runs.enumerate().map(|(i, data)| Run {
                first: first + i * max_rows,
                data,
            }));
        }
        [(len, stride, step), inner @ ..] => {
            for (i, piece) in data.chunks_mut(*stride).take(*len).enumerate() {
                split(out, piece, first + i * step, inner, width, max_rows);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(shape: &[usize], strides: &[isize]) -> Result<RowLayout> {
        RowLayout::new("x", shape, strides)
    }

    #[test]
    fn refuses_what_cannot_be_split() {
        assert!(layout(&[3, 4], &[4, 2]).is_err());
        assert!(layout(&[3, 4], &[-4, 1]).is_err());
        assert!(layout(&[3, 4], &[0, 1]).is_err());
        assert!(layout(&[3, 4], &[2, 1]).is_err());
        assert!(layout(&[3, 1], &[1, 7]).is_ok());
    }

    #[test]
    fn zero_d_empty_and_single() {
        assert_eq!(layout(&[], &[]).unwrap().span(), 1);
        assert_eq!(layout(&[0, 4], &[4, 1]).unwrap().span(), 0);
        assert_eq!(layout(&[4, 0], &[0, 1]).unwrap().rows, 4);
        let mut one = [7.0];
        let runs = RowsMut::new("x", &mut one, layout(&[], &[]).unwrap())
            .unwrap()
            .into_runs(8);
        assert_eq!((runs.len(), runs[0].data.len()), (1, 1));
        let mut none: [f32; 0] = [];
        assert!(
            RowsMut::new("x", &mut none, layout(&[0, 4], &[4, 1]).unwrap())
                .unwrap()
                .into_runs(8)
                .is_empty()
        );
    }

    proptest! {
        /// A view cut out of a larger array by slicing and swapping the leading axes.
        #[test]
        fn runs_cover_every_row_once(
            outer in (1usize..5, 1usize..5, 1usize..6),
            pad in (0usize..3, 0usize..3, 0usize..3),
            swap in any::<bool>(),
            max_rows in 1usize..5,
        ) {
            let (a, b, w) = outer;
            let (fb, fw) = (b + pad.1, w + pad.2);
            let mut shape = [a, b, w];
            let mut strides = [(fb * fw) as isize, fw as isize, 1];
            if swap {
                shape.swap(0, 1);
                strides.swap(0, 1);
            }
            let mut data: Vec<usize> = (0..(a + pad.0) * fb * fw).collect();
            let l = layout(&shape, &strides).unwrap();
            let reader = data.clone();
            let rows = Rows::new("x", &reader, l.clone()).unwrap();
            let expected: Vec<usize> = (0..shape[0] * shape[1])
                .map(|i| i / shape[1] * strides[0] as usize + i % shape[1] * strides[1] as usize)
                .collect();
            for (i, e) in expected.iter().enumerate() {
                prop_assert_eq!(rows.row(i), &reader[*e..e + w]);
            }
            let mut seen = vec![0; a * b];
            for run in RowsMut::new("x", &mut data, l).unwrap().into_runs(max_rows) {
                prop_assert!(run.data.len() / w <= max_rows);
                for (k, row) in run.data.chunks(w).enumerate() {
                    prop_assert_eq!(row[0], expected[run.first + k]);
                    seen[run.first + k] += 1;
                }
            }
            prop_assert!(seen.iter().all(|n| *n == 1));
        }
    }
}
