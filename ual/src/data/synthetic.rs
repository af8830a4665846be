//! Data whose true answer distribution is known.
//!
//! A prompt asks for a relation of a subject: `<begin> relation subject ?`. Subjects belong to groups, which no token
//! names, and a relation answers a subject's group with two words, each from a distribution over 1, 2, 4, …, 32 words:
//! the relation says how many. So a sample's uncertainty is exact: the mean entropy of its words' distributions, over
//! the entropy of the most uncertain case, log 32.
//!
//! Pre-training sees some relations for all subjects and can learn the groups. Fine-tuning is on the other relations,
//! for two thirds of the subjects and with one drawn answer each: where the answer is certain, memorising it is right
//! and carries over to the subject's group; where it is one of 32, memorising it is overfitting. Held out are the other
//! third of the prompts, each with several draws.

use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{SliceRandom, index},
};
use rand_distr::{Distribution as _, Gamma, weighted::WeightedIndex};

use crate::data::samples::{Dataset, Distribution, Sample};

const GROUPS: usize = 12;
const SUBJECTS: usize = 96;
const PRETRAINING_RELATIONS: usize = 24;
const RELATIONS: usize = 36;
const WORDS: usize = 512;
const ANSWER_WORDS: usize = 2;
const WIDTHS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const PRETRAINING_DRAWS: usize = 8;
const HELD_OUT_DRAWS: usize = 4;

// The vocabulary: <begin>, ?, relations, subjects, answer words.
const BEGIN: usize = 0;
const ASK: usize = 1;
const FIRST_RELATION: usize = 2;
const FIRST_SUBJECT: usize = FIRST_RELATION + RELATIONS;
const FIRST_WORD: usize = FIRST_SUBJECT + SUBJECTS;
const VOCAB: usize = FIRST_WORD + WORDS;

pub fn generate(seed: u64) -> Dataset {
    let rng = &mut StdRng::seed_from_u64(seed);
    let answers: Vec<Vec<Distribution>> = (0..RELATIONS * GROUPS)
        .map(|i| {
            let width = WIDTHS[i / GROUPS % WIDTHS.len()];
            (0..ANSWER_WORDS)
                .map(|_| word_distribution(width, rng))
                .collect()
        })
        .collect();
    let mut groups: Vec<usize> = (0..SUBJECTS).map(|subject| subject % GROUPS).collect();
    groups.shuffle(rng);

    let mut data = Dataset {
        vocab: VOCAB,
        pretrain: Vec::new(),
        train: Vec::new(),
        validation: Vec::new(),
        held_out: Vec::new(),
        groups: Vec::new(),
        description: String::new(),
    };
    for relation in 0..RELATIONS {
        let mut subjects: Vec<usize> = (0..SUBJECTS).collect();
        subjects.shuffle(rng);
        for (i, &subject) in subjects.iter().enumerate() {
            let truth = &answers[relation * GROUPS + groups[subject]];
            let (samples, draws) = if relation < PRETRAINING_RELATIONS {
                (&mut data.pretrain, PRETRAINING_DRAWS)
            } else if i < SUBJECTS * 2 / 3 {
                (&mut data.train, 1)
            } else {
                (&mut data.held_out, HELD_OUT_DRAWS)
            };
            samples.extend((0..draws).map(|_| draw(relation, subject, truth, rng)));
        }
    }
    data.description = format!(
        "synthetic questions, vocabulary {VOCAB}: {} training prompts with one answer each, {} held-out prompts with \
         {HELD_OUT_DRAWS} draws each;\nuncertainty: true entropy of the answer / ln {}",
        data.train.len(),
        data.held_out.len() / HELD_OUT_DRAWS,
        WIDTHS[WIDTHS.len() - 1],
    );
    data
}

/// Uneven probabilities of `width` different words.
fn word_distribution(width: usize, rng: &mut StdRng) -> Distribution {
    let gamma = Gamma::new(2f32, 1.0).expect("constants in range");
    let words = index::sample(rng, WORDS, width);
    let weights: Vec<f32> = (0..width).map(|_| gamma.sample(rng)).collect();
    let total: f32 = weights.iter().sum();
    words
        .iter()
        .zip(weights)
        .map(|(word, weight)| ((FIRST_WORD + word) as u32, weight / total))
        .collect()
}

fn draw(relation: usize, subject: usize, truth: &[Distribution], rng: &mut impl Rng) -> Sample {
    let mut tokens: Vec<u32> = [
        BEGIN,
        FIRST_RELATION + relation,
        FIRST_SUBJECT + subject,
        ASK,
    ]
    .iter()
    .map(|&token| token as u32)
    .collect();
    let prompt = tokens.len();
    for distribution in truth {
        let index =
            WeightedIndex::new(distribution.iter().map(|(_, p)| p)).expect("probabilities above 0");
        tokens.push(distribution[index.sample(rng)].0);
    }
    let entropy: f32 = truth.iter().flatten().map(|(_, p)| -p * p.ln()).sum();
    let largest = truth.len() as f32 * (WIDTHS[WIDTHS.len() - 1] as f32).ln();
    // max: the entropy of one answer is -0.
    Sample {
        tokens,
        prompt,
        between: Vec::new(),
        uncertainty: (entropy / largest).max(0.0),
        group: 0,
        truth: truth.to_vec(),
    }
}
