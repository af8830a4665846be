//! Sequences one after another as the rows of a matrix: without padding, and with what all of them begin with once. With causal
//! attention a state depends on the tokens up to it alone, so that the rows are the same as each sequence's own.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{Device, Result, Tensor};

pub struct Packing<'a> {
    sequences: Vec<&'a [u32]>,
    spans: Arc<Spans>,
}

impl<'a> Packing<'a> {
    /// Of sequences that have a token at least.
    pub fn new(sequences: Vec<&'a [u32]>) -> Self {
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let spans = Spans::new(&lengths, common(&sequences));
        Self {
            sequences,
            spans: Arc::new(spans),
        }
    }

    pub fn sequences(&self) -> &[&'a [u32]] {
        &self.sequences
    }

    pub fn spans(&self) -> &Arc<Spans> {
        &self.spans
    }

    /// Of every row, (N) u32.
    pub fn tokens(&self, device: &Device) -> Result<Tensor> {
        let own =
            |(i, tokens): (usize, &&'a [u32])| &tokens[tokens.len() - self.spans.own(i).len()..];
        let tokens: Vec<&[u32]> = self.sequences.iter().enumerate().map(own).collect();
        Tensor::new(tokens.concat(), device)
    }
}

/// Of how many tokens all sequences begin with the same.
fn common(sequences: &[&[u32]]) -> usize {
    let Some((first, others)) = sequences.split_first() else {
        return 0;
    };
    others.iter().fold(first.len(), |common, other| {
        let pairs = first[..common].iter().zip(*other);
        pairs.take_while(|(a, b)| a == b).count()
    })
}

/// Which rows belong to which sequence.
pub struct Spans {
    /// Tokens that all begin with. Their rows are the first sequence's.
    shared: usize,
    /// Where each sequence's own rows begin, and where the last one's end.
    starts: Vec<usize>,
    padded: OnceLock<Padded>,
}

/// For operations that know sequences of one length alone.
pub struct Padded {
    /// Of the longest sequence.
    pub length: usize,
    /// [`padded_rows`](Spans::padded_rows), (B·length) u32.
    pub rows: Tensor,
    /// The position of each row, (N) u32.
    pub positions: Tensor,
}

impl Spans {
    /// Of sequences of these lengths, all at least `shared`.
    pub fn new(lengths: &[usize], shared: usize) -> Self {
        let mut starts = vec![0];
        for (i, length) in lengths.iter().enumerate() {
            let own = if i == 0 { *length } else { length - shared };
            starts.push(starts[i] + own);
        }
        Self {
            shared,
            starts,
            padded: OnceLock::new(),
        }
    }

    pub fn sequences(&self) -> usize {
        self.starts.len() - 1
    }

    /// Of all sequences.
    pub fn rows(&self) -> usize {
        self.starts[self.sequences()]
    }

    /// The rows of a sequence that no other one has; of the first also those that all share.
    pub fn own(&self, sequence: usize) -> Range<usize> {
        self.starts[sequence]..self.starts[sequence + 1]
    }

    /// The rows of the first sequence that come before the own ones of this.
    pub fn before(&self, sequence: usize) -> usize {
        if sequence == 0 { 0 } else { self.shared }
    }

    /// Its tokens.
    pub fn length(&self, sequence: usize) -> usize {
        self.before(sequence) + self.own(sequence).len()
    }

    /// The row of a sequence's token.
    pub fn row(&self, sequence: usize, token: usize) -> usize {
        match token.checked_sub(self.before(sequence)) {
            Some(own) => self.starts[sequence] + own,
            None => token,
        }
    }

    /// Of the longest sequence.
    fn longest(&self) -> usize {
        let lengths = (0..self.sequences()).map(|i| self.length(i));
        lengths.max().unwrap_or(0)
    }

    /// The row of each token of sequences (B, T) that padding makes equally long; 0 in padding.
    pub fn padded_rows(&self) -> Vec<u32> {
        let width = self.longest();
        let row = |(i, t): (usize, usize)| match t < self.length(i) {
            true => self.row(i, t) as u32,
            false => 0,
        };
        let sequences = 0..self.sequences();
        let places = sequences.flat_map(|i| (0..width).map(move |t| (i, t)));
        places.map(row).collect()
    }

    /// None where the rows are sequences of one length as they are.
    pub fn padded(&self, device: &Device) -> Result<Option<&Padded>> {
        let length = self.longest();
        if length * self.sequences() == self.rows() {
            return Ok(None);
        }
        if let Some(padded) = self.padded.get() {
            return Ok(Some(padded));
        }
        let positions = (0..self.sequences())
            .flat_map(|i| (self.before(i)..self.length(i)).map(move |t| (i * length + t) as u32));
        let padded = Padded {
            length,
            rows: Tensor::new(self.padded_rows(), device)?,
            positions: Tensor::from_iter(positions, device)?,
        };
        Ok(Some(self.padded.get_or_init(|| padded)))
    }
}
