//! Whether a tokenizer is the model's.

use anyhow::{Result, ensure};
use candle_core::quantized::gguf_file::Content;
use tokenizers::Tokenizer;

use crate::text::{
    chat::Encoder,
    gguf_tokenizer::{BYTE, CONTROL, NORMAL, Tokens},
};

/// Against the file's own list of tokens. Tokens that users added are written in several ways, and unused ones fill up.
pub fn check_list(content: &Content, tokenizer: &Tokenizer) -> Result<()> {
    let Some(own) = Tokens::of(content)? else {
        return Ok(());
    };
    let compared = own
        .iter()
        .filter(|(_, kind)| [NORMAL, CONTROL, BYTE].contains(kind));
    let found = |id: usize| tokenizer.id_to_token(id as u32);
    let (mut count, mut first) = (0, None);
    for (id, text) in compared.map(|(id, _)| (id, own.texts[id])) {
        if found(id).as_deref() != Some(text) {
            count += 1;
            first.get_or_insert((id, text));
        }
    }
    if let Some((id, text)) = first {
        let found = found(id).map_or("none".to_string(), |found| format!("{found:?}"));
        ensure!(
            count == 0,
            "the tokenizer, of {} tokens, is that of another model: of this one's {} tokens {count} are not in it under \
             their numbers; number {id} is {text:?} here, and {found} there",
            tokenizer.get_vocab_size(true),
            own.texts.len()
        );
    }
    Ok(())
}

/// Against the rows of the embedding: no text may become a token that has none. Control tokens that are not in the
/// template may be without one, as text does not become them.
pub fn check_rows(encoder: &Encoder, rows: usize) -> Result<()> {
    let added = encoder.tokenizer.get_added_tokens_decoder();
    let of_text = encoder.tokenizer.get_vocab(true).into_values();
    let of_text = of_text.filter(|id| added.get(id).is_none_or(|token| !token.special));
    let of_template = encoder.before.iter().chain(&encoder.between);
    let of_template = of_template.chain(&encoder.ending).copied();
    let largest = of_text.chain(of_template).max().unwrap_or(0) as usize;
    ensure!(
        largest < rows,
        "the tokenizer is that of another model: it has a token of number {largest}, and the embedding {rows} rows"
    );
    Ok(())
}
