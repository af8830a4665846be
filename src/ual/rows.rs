//! From samples to the rows of a loss: padded and packed batches.

use candle_core::{Device, Result, Shape, Tensor, bail};

use super::map::SmoothingMap;

/// Where the tokens of a batch of B sequences stand among the rows of the loss.
///
/// * Padded: rows (B, T), T the longest length; sequence i fills the first len_i columns of row i.
/// * Packed: rows (T), T the sum of the lengths; the sequences stand one after the other, sequence i in
///   \[offset_i, offset_{i+1}), as flash-attention's `cu_seqlens` say: \[0, len_0, len_0 + len_1, …, T\].
///
/// # Which row a token belongs to
///
/// Every token is an input, so lengths and offsets count all tokens of a sequence, prompt and response, and logits have a
/// row for each. Row t of a sequence holds the logits *after* token t: it predicts token t + 1. So
///
/// * the target of row t is token t + 1; a sequence's last row has none, and is ignored, also where the next row belongs
///   to another sequence;
/// * what is given for token t + 1, its smoothing for instance, goes to row t. What is given for token 0 is not used;
/// * of a sequence with P prompt tokens, rows P − 1 to len − 2 count: they predict tokens P to len − 1, the response.
///   With P = 0 these are rows 0 to len − 2, as with P = 1: nothing predicts token 0.
///
/// ```
/// use candle_core::Device;
/// use candle_cross_entropy::ual::Layout;
///
/// # fn main() -> candle_core::Result<()> {
/// let device = Device::Cpu;
/// // The first sequence is a prompt of two tokens and a response of three, the second one and one.
/// let tokens = [vec![10u32, 11, 12, 13, 14], vec![20, 21]];
/// let prompts = [2, 1];
///
/// let packed = Layout::packed(&[5, 2])?;
/// assert_eq!(packed.cu_seqlens(), [0, 5, 7]);
/// assert_eq!(packed.tokens(&tokens, 0, &device)?.to_vec1::<u32>()?, [10, 11, 12, 13, 14, 20, 21]);
/// let targets = packed.targets(&tokens, &prompts, -100, &device)?;
/// // token:                                      10  11  12  13    14  20    21
/// assert_eq!(targets.to_vec1::<i64>()?, [-100, 12, 13, 14, -100, 21, -100]);
/// let smoothing = packed.per_sample(&[0.1, 0.3], &device)?;
/// assert_eq!(smoothing.to_vec1::<f32>()?, [0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3]);
/// let of_tokens = [vec![0.0, 0.0, 0.2, 0.3, 0.4], vec![0.0, 0.5]];
/// let smoothing = packed.per_token(&of_tokens, &device)?; // 0.2 is that of token 12, which row 1 predicts
/// assert_eq!(smoothing.to_vec1::<f32>()?, [0.0, 0.2, 0.3, 0.4, 0.0, 0.5, 0.0]);
///
/// let padded = Layout::padded(&[5, 2])?;
/// assert_eq!(padded.tokens(&tokens, 0, &device)?.to_vec2::<u32>()?, [[10, 11, 12, 13, 14], [20, 21, 0, 0, 0]]);
/// let targets = padded.targets(&tokens, &prompts, -100, &device)?;
/// assert_eq!(targets.to_vec2::<i64>()?, [[-100, 12, 13, 14, -100], [21, -100, -100, -100, -100]]);
/// assert_eq!(padded.per_sample(&[0.1, 0.3], &device)?.to_vec2::<f32>()?, [[0.1], [0.3]]); // broadcasts over T
/// # Ok(())
/// # }
/// ```
///
/// Arguments are on the host; tensors are made on the device that is given. Every method fails, naming the argument and
/// the sample (its index in the batch), when it does not fit the lengths.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    cu_seqlens: Vec<u32>,
    /// Of padded rows.
    width: Option<usize>,
}

impl Layout {
    /// Rows (B, T) of sequences of these lengths, in tokens. Fails when they sum to 2³² or more.
    pub fn padded(lengths: &[usize]) -> Result<Self> {
        Ok(Self {
            width: Some(lengths.iter().copied().max().unwrap_or(0)),
            ..Self::packed(lengths)?
        })
    }

    /// Rows (T) of sequences of these lengths, in tokens. Fails when they sum to 2³² or more.
    pub fn packed(lengths: &[usize]) -> Result<Self> {
        let mut cu_seqlens = vec![0u32];
        let mut end = 0u32;
        for (i, &length) in lengths.iter().enumerate() {
            end = match u32::try_from(length).ok().and_then(|n| end.checked_add(n)) {
                Some(end) => end,
                None => bail!(
                    "lengths[{i}] is {length}, after {end} tokens; the sum must be below 2^32"
                ),
            };
            cu_seqlens.push(end);
        }
        Ok(Self {
            cu_seqlens,
            width: None,
        })
    }

    /// Rows (T) of the sequences between these offsets, flash-attention's `cu_seqlens`: B + 1 values from 0 to T. Fails
    /// when they do not start at 0 or descend.
    pub fn from_cu_seqlens(cu_seqlens: &[u32]) -> Result<Self> {
        match cu_seqlens.first() {
            None => bail!("cu_seqlens is empty; it must start with 0"),
            Some(&first) if first != 0 => bail!("cu_seqlens[0] is {first}; it must be 0"),
            Some(_) => {}
        }
        if let Some(i) = cu_seqlens.windows(2).position(|pair| pair[1] < pair[0]) {
            bail!(
                "cu_seqlens[{}] is {}; it must be at least the one before, {}",
                i + 1,
                cu_seqlens[i + 1],
                cu_seqlens[i]
            )
        }
        Ok(Self {
            cu_seqlens: cu_seqlens.to_vec(),
            width: None,
        })
    }

    /// Offsets of the sequences where they are packed, and the end of the last: B + 1 values.
    pub fn cu_seqlens(&self) -> &[u32] {
        &self.cu_seqlens
    }

    /// Length of every sequence, in tokens.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> {
        self.cu_seqlens
            .windows(2)
            .map(|pair| (pair[1] - pair[0]) as usize)
    }

    /// Shape of inputs and targets: (B, T) padded, (T) packed.
    pub fn shape(&self) -> Shape {
        match self.width {
            Some(width) => (self.sequences(), width).into(),
            None => self.packed_rows().into(),
        }
    }

    /// The model's inputs, u32 of [`shape`](Self::shape), from the token ids of every sequence; padding where there is
    /// no token.
    pub fn tokens(
        &self,
        tokens: &[impl AsRef<[u32]>],
        padding: u32,
        device: &Device,
    ) -> Result<Tensor> {
        self.check_ragged("tokens", tokens)?;
        let rows = self.fill(padding, |i, t| tokens[i].as_ref()[t]);
        Tensor::from_vec(rows, self.shape(), device)
    }

    /// The targets, i64 of [`shape`](Self::shape), from the token ids of every sequence and the number of them that are
    /// prompt: the next token where it is response, else `ignore_index` (that of the loss, −100 by default).
    ///
    /// Fails when a prompt is longer than its sequence.
    pub fn targets(
        &self,
        tokens: &[impl AsRef<[u32]>],
        prompts: &[usize],
        ignore_index: i64,
        device: &Device,
    ) -> Result<Tensor> {
        self.check_ragged("tokens", tokens)?;
        self.check_count("prompts", prompts.len())?;
        for (i, (&prompt, length)) in prompts.iter().zip(self.lengths()).enumerate() {
            if prompt > length {
                bail!("prompts[{i}] is {prompt}; it must be at most {length}, the sample's length")
            }
        }
        let rows = self.fill(ignore_index, |i, t| match tokens[i].as_ref().get(t + 1) {
            Some(&token) if t + 1 >= prompts[i] => i64::from(token),
            _ => ignore_index,
        });
        Tensor::from_vec(rows, self.shape(), device)
    }

    /// A value of every sequence (its smoothing, its weight) for all its rows, f32: (B, 1) padded, which the loss
    /// broadcasts over targets (B, T), and (T) packed.
    pub fn per_sample(&self, values: &[f32], device: &Device) -> Result<Tensor> {
        self.check_count("values", values.len())?;
        match self.width {
            Some(_) => Tensor::from_slice(values, (values.len(), 1), device),
            None => Tensor::from_vec(self.fill(0.0, |i, _| values[i]), self.shape(), device),
        }
    }

    /// A value of every token (its smoothing, its weight), f32 of [`shape`](Self::shape): that of token t + 1 in row t, 0
    /// in the last row of a sequence and in padding, which are no targets.
    pub fn per_token(&self, values: &[impl AsRef<[f32]>], device: &Device) -> Result<Tensor> {
        self.check_ragged("values", values)?;
        let rows = self.fill(0.0, |i, t| {
            values[i].as_ref().get(t + 1).copied().unwrap_or(0.0)
        });
        Tensor::from_vec(rows, self.shape(), device)
    }

    /// [`per_sample`](Self::per_sample) of the smoothing that `map` gives every sequence's uncertainty. Fails when one
    /// is not finite.
    pub fn smoothing(
        &self,
        map: &SmoothingMap,
        uncertainties: &[f32],
        device: &Device,
    ) -> Result<Tensor> {
        self.check_count("uncertainties", uncertainties.len())?;
        self.per_sample(&map.smoothing_values(uncertainties)?, device)
    }

    /// [`per_token`](Self::per_token) of the smoothing that `map` gives every token's uncertainty. Fails when one is not
    /// finite, also in a prompt: give 0 there.
    pub fn token_smoothing(
        &self,
        map: &SmoothingMap,
        uncertainties: &[impl AsRef<[f32]>],
        device: &Device,
    ) -> Result<Tensor> {
        self.check_ragged("uncertainties", uncertainties)?;
        let mut smoothing = Vec::with_capacity(uncertainties.len());
        for (i, values) in uncertainties.iter().enumerate() {
            let values = values.as_ref();
            if let Some(t) = values.iter().position(|u| !u.is_finite()) {
                bail!(
                    "uncertainties[{i}][{t}] is {}; it must be finite",
                    values[t]
                )
            }
            smoothing.push(map.smoothing_values(values)?);
        }
        self.per_token(&smoothing, device)
    }

    fn sequences(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    fn packed_rows(&self) -> usize {
        self.cu_seqlens[self.sequences()] as usize
    }

    /// `value(i, t)` in the row of token t of sequence i, `padding` elsewhere.
    fn fill<T: Copy>(&self, padding: T, value: impl Fn(usize, usize) -> T) -> Vec<T> {
        let mut rows = Vec::with_capacity(self.shape().elem_count());
        for (i, length) in self.lengths().enumerate() {
            rows.extend((0..length).map(|t| value(i, t)));
            if let Some(width) = self.width {
                rows.extend(std::iter::repeat_n(padding, width - length));
            }
        }
        rows
    }

    fn check_count(&self, argument: &str, count: usize) -> Result<()> {
        if count != self.sequences() {
            bail!(
                "{argument} has {count} samples; it must have {}, as the layout",
                self.sequences()
            )
        }
        Ok(())
    }

    fn check_ragged<T>(&self, argument: &str, values: &[impl AsRef<[T]>]) -> Result<()> {
        self.check_count(argument, values.len())?;
        for (i, (values, length)) in values.iter().zip(self.lengths()).enumerate() {
            let count = values.as_ref().len();
            if count != length {
                bail!(
                    "{argument}[{i}] has {count} values; it must have {length}, the sample's length"
                )
            }
        }
        Ok(())
    }
}
