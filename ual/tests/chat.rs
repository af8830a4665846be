//! What stands round prompt and response: chat templates as models have them, against the text that Jinja makes of them.

use std::{fs, io::Cursor};

use candle_core::quantized::gguf_file::{self, Content, Value as Metadata};
use candle_ual::{
    data::{
        conversation::{Conversation, Conversations},
        form::Turn,
    },
    text::{
        chat::{Encoder, Lead},
        gguf_tokenizer,
    },
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::{
    AddedToken, PaddingParams, PaddingStrategy, Tokenizer, TruncationParams, models::bpe::BPE,
    pre_tokenizers::byte_level::ByteLevel,
};

const SPECIAL: [&str; 7] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
];

/// Bytes, and the special tokens among `SPECIAL` that `known` says.
fn tokenizer(known: impl Fn(&str) -> bool) -> Tokenizer {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().iter().map(char::to_string).collect();
    alphabet.sort();
    let vocab: tokenizers::models::bpe::Vocab = alphabet.into_iter().zip(0..).collect();
    let bpe = BPE::builder().vocab_and_merges(vocab, vec![]);
    let mut tokenizer = Tokenizer::new(bpe.build().unwrap());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let special = SPECIAL.into_iter().filter(|token| known(token));
    let special: Vec<_> = special.map(|token| AddedToken::from(token, true)).collect();
    tokenizer.add_special_tokens(special).unwrap();
    tokenizer
}

fn encoder(tokenizer: Tokenizer, config: Option<&Value>) -> anyhow::Result<Encoder> {
    let folder = TempDir::new().unwrap();
    if let Some(config) = config {
        fs::write(
            folder.path().join("tokenizer_config.json"),
            config.to_string(),
        )
        .unwrap();
    }
    Encoder::from_folder(folder.path(), tokenizer, None)
}

/// Before the prompt, between prompt and response, and the end, as text.
fn frame(encoder: &Encoder) -> [String; 3] {
    let text = |ids: &[u32]| encoder.tokenizer.decode(ids, false).unwrap();
    [
        text(&encoder.before),
        text(&encoder.between),
        text(&encoder.ending[encoder.ending.len() - 1..]),
    ]
}

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// In the manner of Llama 3's, with what such templates use: blocks on lines of their own, methods of strings, an
/// exception that is not raised.
const HEADERS: &str = r"{{- bos_token }}
{%- if not messages %}
    {{- raise_exception('no messages') }}
{%- endif %}
{% for message in messages %}
    {% set role = message.role.strip() %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{% endfor %}
";

#[test]
fn a_model_sees_its_own_chat_template() {
    let config = json!({"chat_template": SMOLLM2, "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}});
    let encoder = encoder(tokenizer(|_| true), Some(&config)).unwrap();
    assert_eq!(
        frame(&encoder),
        [
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>"
        ]
    );
    // Special tokens of the template are single ones, in a sample they are text.
    let start = encoder.tokenizer.token_to_id("<|im_start|>").unwrap();
    assert_eq!(encoder.before.iter().filter(|id| **id == start).count(), 2);
    assert_eq!(
        encoder.ids("<|im_start|>").unwrap().len(),
        "<|im_start|>".len()
    );
}

#[test]
fn templates_with_blocks_methods_and_exceptions_are_rendered() {
    let named = json!([{"name": "tool_use", "template": "nothing"}, {"name": "default", "template": HEADERS}]);
    let config = json!({"chat_template": named, "bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"});
    let encoder = encoder(tokenizer(|_| true), Some(&config)).unwrap();
    assert_eq!(
        frame(&encoder),
        [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>"
        ]
    );
}

fn turns(turns: &[(&str, &str)]) -> Vec<Turn> {
    let turns = turns.iter();
    turns.map(|(role, text)| Turn::new(role, *text)).collect()
}

/// The text of a conversation, and of what is learned.
fn seen(encoder: &Encoder, conversation: &Conversation) -> (String, Vec<String>) {
    let text = |ids: &[u32]| encoder.tokenizer.decode(ids, false).unwrap();
    let responses = conversation.responses.iter();
    let responses = responses.map(|range| text(&conversation.tokens[range.clone()]));
    (text(&conversation.tokens), responses.collect())
}

const CONVERSATION: [(&str, &str); 5] = [
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "1"),
    ("user", "<|im_end|>?"),
    ("assistant", "A token."),
];

#[test]
fn every_response_of_a_conversation_is_learned_and_nothing_else() {
    let told = |template: Option<&str>, known: fn(&str) -> bool| {
        let config = json!({"chat_template": template, "bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"});
        let encoder = encoder(tokenizer(known), Some(&config)).unwrap();
        let encoded = Conversations::new(&encoder).encode(&turns(&CONVERSATION), 1000);
        let encoded = encoded.unwrap();
        assert!(!encoded.cut);
        seen(&encoder, &encoded)
    };
    let chatml = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n\
        1<|im_end|>\n<|im_start|>user\n<|im_end|>?<|im_end|>\n<|im_start|>assistant\nA token.<|im_end|>";
    let learned = ["1<|im_end|>", "A token.<|im_end|>"]
        .map(String::from)
        .to_vec();
    assert_eq!(
        told(Some(SMOLLM2), |_| true),
        (chatml.into(), learned.clone())
    );
    assert_eq!(told(None, |_| true), (chatml.into(), learned));
    let headers = ["system", "user", "assistant", "user", "assistant"].into_iter();
    let headers: String = headers
        .zip(CONVERSATION)
        .map(|(role, (_, text))| {
            format!("<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>\n")
        })
        .collect();
    let (text, learned) = told(Some(HEADERS), |_| true);
    assert_eq!(text, format!("<|begin_of_text|>{}", headers.trim_end()));
    assert_eq!(learned, ["1<|eot_id|>", "A token.<|eot_id|>"]);
    let (text, learned) = told(None, |token| !token.starts_with("<|im"));
    assert_eq!(
        text,
        "Be brief.\nOne?\n1<|endoftext|><|im_end|>?\nA token.<|endoftext|>"
    );
    assert_eq!(learned, ["1<|endoftext|>", "A token.<|endoftext|>"]);
}

#[test]
fn templates_that_move_or_refuse_turns_are_followed() {
    let told = |template: &str, roles: &[(&str, &str)]| {
        let config = json!({"chat_template": template, "eos_token": "<|endoftext|>"});
        let encoder = encoder(tokenizer(|_| true), Some(&config)).unwrap();
        let encoded = Conversations::new(&encoder).encode(&turns(roles), 1000);
        encoded
            .map(|encoded| seen(&encoder, &encoded))
            .map_err(|e| format!("{e:#}"))
    };
    // The system's before the last question, as Mistral's templates have it.
    let moves = "{% set said = '' %}{% if messages[0].role == 'system' %}{% set said = messages[0].content + ' ' %}{% endif %}\
        {% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[{{ said if loop.index > loop.length - 2 else '' }}\
        {{ m.content }}]{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
    let (text, learned) = told(moves, &CONVERSATION).unwrap();
    assert_eq!(
        text,
        "[One?]1<|endoftext|>[Be brief. <|im_end|>?]A token.<|endoftext|>"
    );
    assert_eq!(learned, ["1<|endoftext|>", "A token.<|endoftext|>"]);
    let users = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
        {{ m.content }}{{ eos_token }}{% endfor %}";
    let refused = told(users, &CONVERSATION).unwrap_err();
    assert!(
        refused.contains("system, user, assistant") && refused.contains("no system"),
        "{refused}"
    );
    let forgets = "{{ messages[0].content }}|{{ messages[1].content }}";
    let refused = told(forgets, &CONVERSATION[1..]).unwrap_err();
    assert!(refused.contains("turn 3 (user) 0 times"), "{refused}");
}

#[test]
fn a_conversation_that_is_too_long_loses_its_first_exchanges() {
    let encoder = encoder(tokenizer(|token| !token.starts_with("<|im")), None).unwrap();
    let conversations = Conversations::new(&encoder);
    let cut = |most: usize| {
        let encoded = conversations.encode(&turns(&CONVERSATION), most).unwrap();
        assert!(encoded.tokens.len() <= most);
        (encoded.cut, seen(&encoder, &encoded))
    };
    // Bytes, and a token at each end.
    assert!(!cut(16 + 2 + 11 + 9).0);
    let (was_cut, (text, learned)) = cut(16 + 2 + 11 + 8);
    assert!(was_cut);
    assert_eq!(text, "Be brief.\n<|im_end|>?\nA token.<|endoftext|>");
    assert_eq!(learned, ["A token.<|endoftext|>"]);
    let (_, (text, learned)) = cut(14);
    // 12 bytes between two line breaks: 6 of the prompt's end, 6 of the response.
    assert_eq!(text, "\nend|>?\nA toke");
    assert_eq!(learned, ["A toke"]);
}

#[test]
fn a_file_of_its_own_comes_before_the_configuration() {
    let folder = TempDir::new().unwrap();
    let template = "{{ messages[0].content }}<|im_start|>{{ messages[1].content }}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let config = json!({"chat_template": SMOLLM2, "eos_token": "<|endoftext|>"});
    fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    let encoder = Encoder::from_folder(folder.path(), tokenizer(|_| true), None).unwrap();
    assert_eq!(frame(&encoder), ["", "<|im_start|>", "<|endoftext|>"]);
}

#[test]
fn without_a_template_it_is_chatml_or_lines() {
    let chat = encoder(tokenizer(|_| true), None).unwrap();
    assert_eq!(
        frame(&chat),
        [
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>"
        ]
    );
    let plain =
        |config: Option<&Value>| encoder(tokenizer(|t| !t.starts_with("<|im")), config).unwrap();
    assert_eq!(frame(&plain(None)), ["", "\n", "<|endoftext|>"]);
    let config =
        json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "add_bos_token": true});
    assert_eq!(
        frame(&plain(Some(&config))),
        ["<|begin_of_text|>", "\n", "<|eot_id|>"]
    );
}

#[test]
fn a_tokenizer_neither_cuts_nor_pads() {
    let mut saved = tokenizer(|_| true);
    let truncation = TruncationParams {
        max_length: 2,
        ..Default::default()
    };
    saved.with_truncation(Some(truncation)).unwrap();
    let strategy = PaddingStrategy::Fixed(64);
    saved.with_padding(Some(PaddingParams {
        strategy,
        ..Default::default()
    }));
    let encoder = encoder(saved, None).unwrap();
    assert_eq!(encoder.ids("12345").unwrap().len(), 5);
    assert_eq!(frame(&encoder)[0], "<|im_start|>user\n");
}

#[test]
fn what_cannot_be_used_is_refused() {
    let refusal = |template: &str| {
        let config = json!({"chat_template": template, "eos_token": "<|endoftext|>"});
        let refused = encoder(tokenizer(|_| true), Some(&config)).err().unwrap();
        format!("{refused:#}")
    };
    assert!(
        refusal("{{ messages[1].content }}{{ messages[0].content }}").contains("in this order")
    );
    assert!(refusal("{{ raise_exception('only tools') }}").contains("only tools"));
    assert!(refusal("{% if %}").contains("chat template"));
    let no_end = encoder(tokenizer(|_| false), None).err().unwrap();
    assert!(no_end.to_string().contains("no token that ends"));
}

fn content(metadata: &[(&str, Metadata)]) -> Content {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &[]).unwrap();
    file.set_position(0);
    Content::read(&mut file).unwrap()
}

/// Of a GGUF file with bytes and the word "ab", which no merge makes.
fn from_gguf(pre: &str, more: &[(&str, Metadata)]) -> Encoder {
    let mut tokens: Vec<String> = ByteLevel::alphabet().iter().map(char::to_string).collect();
    tokens.sort();
    tokens.extend(["aa", "ab"].map(String::from));
    let control = tokens.len();
    tokens.extend(["<|begin_of_text|>", "<|eot_id|>"].map(String::from));
    let kinds = (0..tokens.len()).map(|i| Metadata::I32(if i < control { 1 } else { 3 }));
    let kinds = Metadata::Array(kinds.collect());
    let tokens = Metadata::Array(tokens.into_iter().map(Metadata::String).collect());
    let metadata = [
        ("tokenizer.ggml.model", Metadata::String("gpt2".into())),
        ("tokenizer.ggml.pre", Metadata::String(pre.into())),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.token_type", kinds),
        (
            "tokenizer.ggml.merges",
            Metadata::Array(vec![Metadata::String("a a".into())]),
        ),
        ("tokenizer.ggml.bos_token_id", Metadata::U32(control as u32)),
        (
            "tokenizer.ggml.eos_token_id",
            Metadata::U32(control as u32 + 1),
        ),
    ];
    let content = content(&[&metadata[..], more].concat());
    let tokenizer = gguf_tokenizer::tokenizer(&content).unwrap();
    Encoder::from_gguf(&content, tokenizer, None).unwrap()
}

#[test]
fn a_gguf_file_has_a_template_or_llama_3s_beginning() {
    let llama3 = from_gguf("llama-bpe", &[]);
    assert_eq!(frame(&llama3), ["<|begin_of_text|>", "\n", "<|eot_id|>"]);
    assert_eq!(
        llama3.ids("ab").unwrap().len(),
        1,
        "a word that is a token is one"
    );
    let without = ("tokenizer.ggml.add_bos_token", Metadata::Bool(false));
    assert_eq!(frame(&from_gguf("llama-bpe", &[without]))[0], "");

    let smollm = from_gguf("smollm", &[]);
    assert_eq!(frame(&smollm), ["", "\n", "<|eot_id|>"]);
    assert_eq!(smollm.ids("ab").unwrap().len(), 2);
    let template = Metadata::String(
        "{{ bos_token }}Q {{ messages[0].content }}{{ eos_token }}A {{ messages[1].content }}"
            .into(),
    );
    let template = from_gguf("smollm", &[("tokenizer.chat_template", template)]);
    assert_eq!(
        frame(&template),
        ["<|begin_of_text|>Q ", "<|eot_id|>A ", "<|eot_id|>"]
    );
}

fn strings(texts: &[String]) -> Metadata {
    Metadata::Array(texts.iter().cloned().map(Metadata::String).collect())
}

/// What `tokenizers/make_sentence_piece.py` made: a vocabulary, and sentencepiece's own tokens of texts.
#[derive(serde::Deserialize)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
    texts: Vec<Pieces>,
}

#[derive(serde::Deserialize)]
struct Pieces {
    text: String,
    ids: Vec<u32>,
    /// Without the space before the text.
    middle: Vec<u32>,
}

impl SentencePiece {
    fn made() -> Self {
        serde_json::from_str(include_str!("tokenizers/sentence_piece.json")).unwrap()
    }

    fn encoder(&self, more: &[(&str, Metadata)]) -> Encoder {
        let scores = self.scores.iter().copied().map(Metadata::F32);
        let kinds = self.kinds.iter().copied().map(Metadata::I32);
        let metadata = [
            ("tokenizer.ggml.model", Metadata::String("llama".into())),
            ("tokenizer.ggml.tokens", strings(&self.tokens)),
            ("tokenizer.ggml.scores", Metadata::Array(scores.collect())),
            (
                "tokenizer.ggml.token_type",
                Metadata::Array(kinds.collect()),
            ),
            ("tokenizer.ggml.bos_token_id", Metadata::U32(1)),
            ("tokenizer.ggml.eos_token_id", Metadata::U32(2)),
        ];
        let content = content(&[&metadata[..], more].concat());
        let tokenizer = gguf_tokenizer::tokenizer(&content).unwrap();
        Encoder::from_gguf(&content, tokenizer, None).unwrap()
    }

    fn tokens<'a>(&'a self, ids: &[u32]) -> Vec<&'a str> {
        ids.iter()
            .map(|&id| self.tokens[id as usize].as_str())
            .collect()
    }
}

#[test]
fn sentence_piece_of_a_gguf_file_is_sentence_piece() {
    let made = SentencePiece::made();
    let encoder = made.encoder(&[]);
    assert!(made.texts.len() > 50);
    for Pieces { text, ids, middle } in &made.texts {
        assert_eq!(
            made.tokens(&encoder.ids(text).unwrap()),
            made.tokens(ids),
            "{text:?}"
        );
        let found = encoder.ids_after(text, Lead::Middle).unwrap();
        assert_eq!(
            made.tokens(&found),
            made.tokens(middle),
            "{text:?} in the middle"
        );
        if !text.contains(['<', '\u{a0}']) {
            assert_eq!(encoder.tokenizer.decode(ids, false).unwrap(), *text);
        }
    }
    // A token that users added is one wherever it stands, a control token is text.
    assert_eq!(
        made.tokens(&encoder.ids("a<tool></s>").unwrap())[..2],
        ["▁a", "<tool>"]
    );
    assert!(!encoder.ids("a<tool></s>").unwrap().contains(&2));
    let without = ("tokenizer.ggml.add_space_prefix", Metadata::Bool(false));
    let encoder = made.encoder(&[without]);
    for Pieces { text, middle, .. } in &made.texts {
        assert_eq!(encoder.ids(text).unwrap(), *middle, "{text:?}");
    }
}

/// As llama.cpp tokenises the whole: one beginning, a space before what begins or follows a control token, and none that
/// the template does not say before a turn; a space at the end of the template's text is part of the turn's first token.
#[test]
fn a_template_for_sentence_piece_gives_the_tokens_of_the_whole() {
    let made = SentencePiece::made();
    let whole = |template: &str, turns: &[(&str, &str)]| {
        let template = ("tokenizer.chat_template", Metadata::String(template.into()));
        let encoder = made.encoder(&[template]);
        let encoded = Conversations::new(&encoder)
            .encode(&self::turns(turns), 1000)
            .unwrap();
        let ids = encoded
            .responses
            .iter()
            .map(|range| &encoded.tokens[range.clone()]);
        let learned: Vec<_> = ids.map(|ids| made.tokens(ids)).collect();
        (made.tokens(&encoded.tokens).join("|"), learned)
    };
    let llama2 = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [INST]' }}{% else %}\
        {{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}";
    let (text, learned) = whole(llama2, &[("user", "the will"), ("assistant", "no more")]);
    assert_eq!(text, "<s>|[INST]|▁the|▁will|▁|[INST]|▁no|▁more|▁|</s>");
    assert_eq!(learned, [["▁no", "▁more", "▁", "</s>"]]);
    let twice = [
        ("user", "the"),
        ("assistant", "no"),
        ("user", "more"),
        ("assistant", "so"),
    ];
    let (text, _) = whole(llama2, &twice);
    assert_eq!(
        text,
        "<s>|[INST]|▁the|▁|[INST]|▁no|▁|</s>|<s>|[INST]|▁more|▁|[INST]|▁so|▁|</s>"
    );
    // As Zephyr's and TinyLlama's have it, whose roles are text.
    let lines =
        "{% for m in messages %}{{ m.role[:1] + '\n' + m.content + eos_token + '\n' }}{% endfor %}";
    let (text, _) = whole(lines, &[("user", "the will"), ("assistant", "the")]);
    let users = made
        .tokens(&made.encoder(&[]).ids("u\n").unwrap())
        .join("|");
    let expected = format!("{users}|the|▁will|</s>|▁|<0x0A>|a|<0x0A>|the|</s>");
    assert_eq!(text, expected);
    // Without a template a text has one beginning.
    let encoder = made.encoder(&[]);
    assert_eq!(made.tokens(&encoder.before), ["<s>"]);
    assert_eq!(made.tokens(&encoder.between), ["<0x0A>"]);
}

#[test]
fn tokens_that_users_added_are_one_each() {
    let tokens = ["<s>", "</s>", "<tool>", "a", "b"].map(String::from);
    let kinds = [3, 3, 4, 1, 1].map(Metadata::I32);
    let metadata = [
        ("tokenizer.ggml.model", Metadata::String("gpt2".into())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.merges", strings(&[])),
        ("tokenizer.ggml.token_type", Metadata::Array(kinds.to_vec())),
        ("tokenizer.ggml.bos_token_id", Metadata::U32(0)),
        ("tokenizer.ggml.eos_token_id", Metadata::U32(1)),
        ("tokenizer.ggml.add_bos_token", Metadata::Bool(true)),
    ];
    let template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}b{{ messages[1].content }}{{ eos_token }}";
    let template = ("tokenizer.chat_template", Metadata::String(template.into()));
    let content = content(&[&metadata[..], &[template]].concat());
    let tokenizer = gguf_tokenizer::tokenizer(&content).unwrap();
    let encoder = Encoder::from_gguf(&content, tokenizer, None).unwrap();
    assert_eq!(encoder.ids("a<tool>b").unwrap(), [3, 2, 4]);
    assert!(!encoder.ids("a<s>").unwrap().contains(&0));
    // The template's beginning is the only one, though the file asks for one.
    assert_eq!(
        (&encoder.before[..], &encoder.between[..]),
        (&[0][..], &[1, 4][..])
    );
}

/// The rules of Qwen 2 and of Tekken for words, and Llama 3's.
#[test]
fn byte_level_tokenizers_divide_texts_by_their_own_rules() {
    let words = |pre: &str| {
        let encoder = from_gguf(pre, &[]);
        let words = encoder.tokenizer.get_pre_tokenizer().unwrap();
        let mut text = tokenizers::PreTokenizedString::from("It's 12345 aB\u{301}c");
        tokenizers::PreTokenizer::pre_tokenize(words, &mut text).unwrap();
        let splits = text.get_splits(
            tokenizers::OffsetReferential::Original,
            tokenizers::OffsetType::Byte,
        );
        splits
            .into_iter()
            .map(|(word, ..)| word.replace('Ġ', " "))
            .collect::<Vec<_>>()
    };
    let plain = |words: Vec<String>| {
        words
            .join("|")
            .replace("ÌģĠ", "\u{301} ")
            .replace("Ìģ", "\u{301}")
    };
    assert_eq!(plain(words("qwen2")), "It|'s| |1|2|3|4|5| aB|\u{301}c");
    assert_eq!(plain(words("llama-bpe")), "It|'s| |123|45| aB|\u{301}c");
    assert_eq!(plain(words("tekken")), "It|'s| |1|2|3|4|5| a|B\u{301}c");
    // Qwen's texts are composed before: e and its accent are one character.
    let qwen = from_gguf("qwen2", &[]);
    assert_eq!(qwen.ids("e\u{301}").unwrap(), qwen.ids("é").unwrap());
}
