//! A run of the command.

use anyhow::Result;

use crate::{
    commands::probe::{args::Args, hidden, questions},
    files::Folder,
    training::ranks,
};

pub fn run(args: &Args) -> Result<()> {
    ranks::refuse("probe")?;
    args.check()?;
    let questions = questions::read(&args.data, args.limit, args.seed)?;
    let _locked = Folder::make(&args.out)?;
    let all: Vec<_> = questions.train.iter().chain(&questions.held_out).collect();
    let hidden = hidden::of(&all, (&args.model, &args.overrides), &args.out)?;
    println!("{:?}", hidden.states.shape());
    Ok(())
}
