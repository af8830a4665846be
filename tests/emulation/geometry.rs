//! The shapes for which `scripts/count-operations.py` counts whole rows are those that select.rs picks.

use crate::kernels::{
    abi::Element,
    select::{self, Gpu, H200},
};

const RTX_5090: Gpu = Gpu {
    multiprocessors: 170,
    l2: 96 << 20,
    shared_per_multiprocessor: 100 << 10,
    shared_per_block: 99 << 10,
    shared_reserved: 1 << 10,
    max_cluster: 8,
    max_cluster_alone: 8,
    uneven_clusters: H200.uneven_clusters,
};

/// `UPDATE_GEOMETRY=1 cargo test --test emulation geometry` writes the file anew.
#[test]
fn counted_shapes_are_those_chosen() {
    let mut table =
        "# GPU, kernel, vocabulary, blocks a row, 16-byte groups a block.\n".to_string();
    let vocabularies = [32000, 50257, 128256, 151936, 202048, 262144];
    let gpus = [
        ("H200", H200),
        ("H100", H200),
        ("B200", H200),
        ("RTX 5090", RTX_5090),
    ];
    let element = Element::BF16;
    for (name, gpu) in gpus {
        for (gradient, stats) in [(true, true), (true, false), (false, false)] {
            for vocab in vocabularies {
                let (kind, shape) = ((element, stats, false), (vocab, vocab));
                let choice = if gradient {
                    select::loss_and_gradient(kind, shape, &gpu, None)
                } else {
                    select::forward(kind, shape, &gpu, None)
                };
                let (kernel, geometry) = choice.expect("nothing is forced");
                table += &format!(
                    "{name}\t{}\t{vocab}\t{}\t{}\n",
                    kernel.symbol(),
                    geometry.blocks_per_row,
                    geometry.groups_per_block
                );
            }
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/geometry.tsv");
    if std::env::var_os("UPDATE_GEOMETRY").is_some() {
        std::fs::write(path, &table).expect("a writable file");
    }
    let written = std::fs::read_to_string(path).expect("a readable file");
    assert_eq!(table, written, "UPDATE_GEOMETRY=1 writes it anew");
}
