//! `ual data` makes files of samples whose uncertainty is known: [`human_ratings`] from sentences that many people have
//! rated, with questions of one right answer beside them.

pub mod args;
pub mod human_ratings;
