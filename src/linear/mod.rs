//! `forward_linear`: from hidden states and the output projection to the loss, with as much of the logits in memory as the
//! budget allows. Rows that need no logits are left out ([`rows`]), what is left is an operation of candle's ([`graph`]).

mod graph;
mod rows;

use candle_core::{Result, Tensor};

use self::rows::ChosenRows;
use crate::{
    call::{Call, Groups},
    options::{CrossEntropy, Reduction},
    results::RowStats,
    targets::Targets,
};

pub(crate) fn forward(
    options: &CrossEntropy,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Targets,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let groups = Groups::of(options);
    let call = groups.tell(Call::linear(options, hidden, weight, bias, targets))?;
    let depth = hidden.dims()[hidden.rank() - 1];
    let hidden = if hidden.rank() == 2 {
        hidden.clone()
    } else {
        hidden.reshape((call.rows, depth))?
    };
    let Some(chosen) = groups.tell(ChosenRows::of(options, &call, stats))? else {
        return graph::apply(options, call, &hidden, weight, bias, stats);
    };
    let hidden = chosen.hidden(&hidden)?;
    let (loss, stats) = graph::apply(options, chosen.call(&call)?, &hidden, weight, bias, stats)?;
    let all_rows = |values: &Tensor| chosen.spread(values)?.reshape(call.shape.as_slice());
    let loss = match call.reduction {
        Reduction::None => all_rows(&loss)?,
        _ => loss,
    };
    let all_stats = |stats: RowStats| {
        Result::Ok(RowStats {
            nll: all_rows(&stats.nll)?,
            lse: all_rows(&stats.lse)?,
            entropy: all_rows(&stats.entropy)?,
            max_prob: all_rows(&stats.max_prob)?,
            grad_norm_sq: all_rows(&stats.grad_norm_sq)?,
            predicted: all_rows(&stats.predicted)?,
        })
    };
    Ok((loss, stats.map(all_stats).transpose()?))
}
