//! Conversations as tokens, and which of them are learned.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, bail, ensure};

use crate::{
    data::form::Turn,
    text::chat::{Encoder, Lead, Piece},
};

pub struct Conversation {
    pub tokens: Vec<u32>,
    /// The responses, in order, each with the token that ends it; the last ends with `tokens`.
    pub responses: Vec<Range<usize>>,
    /// Whether something had to go.
    pub cut: bool,
}

/// An encoder, and what it has found out about the template for conversations of certain roles.
pub struct Conversations<'a> {
    encoder: &'a Encoder,
    pieces: Mutex<HashMap<Vec<String>, Arc<Vec<Piece>>>>,
}

impl<'a> Conversations<'a> {
    pub fn new(encoder: &'a Encoder) -> Self {
        Self {
            encoder,
            pieces: Mutex::new(HashMap::new()),
        }
    }

    /// A conversation that ends with a response. Where it has more than `most` tokens its first exchanges go, and what
    /// the system says stays; then the text before the only response, which keeps its end, where the question usually
    /// is, and at most half of the room if the response needs the rest.
    pub fn encode(&self, turns: &[Turn], most: usize) -> Result<Conversation> {
        let ids = |turn: &Turn, lead: Lead| self.encoder.ids_after(&turn.text, lead);
        let encoded = |turn| Ok((turn, Lead::Start, ids(turn, Lead::Start)?));
        let mut turns = turns.iter().map(encoded).collect::<Result<Vec<_>>>()?;
        let mut cut = false;
        loop {
            let pieces = self.pieces(&turns)?;
            for piece in &*pieces {
                if let &Piece::Turn(i, lead) = piece
                    && turns[i].1 != lead
                {
                    turns[i] = (turns[i].0, lead, ids(turns[i].0, lead)?);
                }
            }
            let fixed: usize = pieces.iter().map(of_template).sum();
            let texts: usize = turns.iter().map(|(.., ids)| ids.len()).sum();
            if fixed + texts <= most {
                return joined(pieces.iter(), &turns, cut);
            }
            cut = true;
            let first = turns
                .windows(2)
                .position(|pair| pair[0].0.is_response() && !pair[1].0.is_response());
            if let Some(first) = first {
                let mut number = 0..;
                turns.retain(|(turn, ..)| number.next() > Some(first) || turn.role == "system");
                continue;
            }
            // What ends the response takes part in what is cut.
            let around = fixed - self.encoder.ending.len();
            let room = most.saturating_sub(around);
            if room < 2 {
                bail!("{most} tokens leave no room beside the {around} round a prompt");
            }
            let (response, before) = turns.split_last_mut().expect("a response");
            let response = &mut response.2;
            response.extend(&self.encoder.ending);
            let for_prompt = (room - response.len().min(room)).max(room / 2);
            let prompt: usize = before.iter().map(|(.., ids)| ids.len()).sum();
            let mut surplus = prompt.saturating_sub(for_prompt);
            response.truncate(room - (prompt - surplus));
            for (.., ids) in before {
                surplus -= ids.drain(..surplus.min(ids.len())).len();
            }
            // The end stays only where the response does.
            return joined(&pieces[..pieces.len() - 1], &turns, cut);
        }
    }

    fn pieces(&self, turns: &[Encoded]) -> Result<Arc<Vec<Piece>>> {
        let roles: Vec<String> = turns.iter().map(|(turn, ..)| turn.role.clone()).collect();
        let mut known = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pieces) = known.get(&roles) {
            return Ok(pieces.clone());
        }
        let names: Vec<&str> = roles.iter().map(String::as_str).collect();
        let pieces = Arc::new(self.encoder.pieces(&names)?);
        known.insert(roles, pieces.clone());
        Ok(pieces)
    }
}

/// A turn, what precedes it, and its tokens.
type Encoded<'a> = (&'a Turn, Lead, Vec<u32>);

fn of_template(piece: &Piece) -> usize {
    match piece {
        Piece::Template { tokens, .. } => tokens.len(),
        Piece::Turn(..) => 0,
    }
}

fn joined<'a>(
    pieces: impl IntoIterator<Item = &'a Piece>,
    turns: &[Encoded],
    cut: bool,
) -> Result<Conversation> {
    let mut all = Conversation {
        tokens: Vec::new(),
        responses: Vec::new(),
        cut,
    };
    for piece in pieces {
        let start = all.tokens.len();
        match piece {
            Piece::Template { tokens, learned } => {
                all.tokens.extend(tokens);
                if let (true, Some(response)) = (*learned > 0, all.responses.last_mut()) {
                    response.end = start + learned;
                }
            }
            Piece::Turn(i, _) => {
                let (turn, _, ids) = &turns[*i];
                all.tokens.extend(ids);
                if turn.is_response() {
                    all.responses.push(start..all.tokens.len());
                }
            }
        }
    }
    ensure!(
        all.responses.first().is_some_and(|first| first.start > 0),
        "nothing stands before the response"
    );
    Ok(all)
}
