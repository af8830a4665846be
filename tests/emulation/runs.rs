//! The launches of a problem: every kernel of its element type, with the buffers they read and write.

use bytemuck::Zeroable as _;

use super::{
    case::{Buffer, Case, POISON, Shape},
    problem::{Eps, OnChip, Problem, Ranks, Target, Tiles, View, to_bytes},
};
use crate::kernels::{
    abi::{
        ClassCheck, DistributionRunning, DistributionState, Element, Kernel, MERGE_THREADS,
        NamedGradient, Params, REDUCE_THREADS, RowState, Running, inner_factors,
    },
    select::{self, Forced, Geometry, H200},
};

pub const STATS: [&str; 5] = ["nll", "lse", "entropy", "max_prob", "grad_norm_sq"];

/// A total weight that is not these rows' alone.
pub const OF_ALL_RANKS: f32 = 12.5;

/// A launch over the rows, and the buffers of its outputs.
pub struct RowRun {
    pub label: String,
    pub has_upstream: bool,
    pub loss: Option<Buffer>,
    /// With its view, and what the gaps between rows hold.
    pub grad: Option<(Buffer, View, Vec<u8>)>,
    pub stats: Option<[Buffer; 5]>,
    pub predicted: Option<Buffer>,
    pub first_error: Option<Buffer>,
    /// Rows that ranks were given differently, which is an error.
    pub differ: Vec<usize>,
}

/// Every launch of a problem.
pub struct Runs {
    pub case: Case,
    pub rows: Vec<RowRun>,
    /// Of each of the problem's [`Tiles`].
    pub tiles: Vec<RowRun>,
    /// Of each of its [`Ranks`].
    pub ranks: Vec<RowRun>,
    pub total_weight: Buffer,
    pub reduced: Buffer,
    /// The same where a mean is divided by [`OF_ALL_RANKS`].
    pub reduced_of_all: Buffer,
    /// Where the check of the classes' values reports bad ones, if they have any.
    pub class_error: Option<Buffer>,
}

impl Runs {
    pub fn new(p: &Problem) -> Self {
        let mut case = Case::new(&p.seeds);
        let mut params = inputs(&mut case, p);
        let class_error = (params.class_weights != 0 || params.prior != 0).then(|| {
            let check = case.poisoned("class_check", size_of::<ClassCheck>(), 4);
            let error = case.output("first_error of classes", &[u64::MAX], 8);
            params.class_check = check.start();
            let params = Params {
                first_error: error.start(),
                ..params
            };
            case.launch(Kernel::Classes, params, Shape::plain(1, REDUCE_THREADS));
            error
        });

        let total_weight = case.poisoned("total_weight", 4, 0);
        let weigh = Params {
            loss: 0,
            reduced: 0,
            total_weight: total_weight.start(),
            ..params
        };
        case.launch(Kernel::Reduce, weigh, Shape::plain(1, REDUCE_THREADS));
        let divisor = if p.mean { total_weight.start() } else { 0 };

        let mut rows = Vec::new();
        let mut launch = |case: &mut Case, (kernel, geometry): (Kernel, Geometry), params, run| {
            let shape = Shape::plain(p.rows() as u32, geometry.threads);
            case.launch(kernel, params, shape);
            rows.push(run);
        };

        let state = states(&mut case, p);
        let (run, stats_params) =
            row_outputs(&mut case, "forward with statistics", p, true, params);
        let loss = run.loss.expect("a forward has a loss");
        launch(
            &mut case,
            forward_kernel(p, true, p.width),
            Params {
                state: state.start(),
                ..stats_params
            },
            run,
        );

        let (run, plain_params) = row_outputs(&mut case, "forward", p, false, params);
        launch(
            &mut case,
            forward_kernel(p, false, p.width),
            plain_params,
            run,
        );

        let reduced = case.poisoned("reduced", 4, 0);
        let reduce = Params {
            loss: loss.start(),
            reduced: reduced.start(),
            ..weigh
        };
        case.launch(Kernel::Reduce, reduce, Shape::plain(1, REDUCE_THREADS));
        let reduced_of_all = case.poisoned("reduced of all", 4, 4);
        let reduce = Params {
            reduced: reduced_of_all.start(),
            divisor: case.input("divisor", &[OF_ALL_RANKS], 4).start(),
            total_weight: 0,
            ..reduce
        };
        case.launch(Kernel::Reduce, reduce, Shape::plain(1, REDUCE_THREADS));

        for (label, in_place) in [("backward", false), ("backward in place", true)] {
            let upstream = case.input("upstream", &p.upstream, 0);
            let params = Params {
                state: state.start(),
                upstream: upstream.start(),
                upstream_per_row: u32::from(p.upstream.len() > 1),
                divisor,
                ..params
            };
            let (grad, params) = gradient(&mut case, p, in_place, params);
            let run = RowRun {
                label: label.into(),
                has_upstream: true,
                loss: None,
                grad: Some(grad),
                stats: None,
                predicted: None,
                first_error: None,
                differ: Vec::new(),
            };
            launch(&mut case, backward_kernel(p, p.width), params, run);
        }
        for (label, in_place) in [("fused", false), ("fused in place", true)] {
            let stats = fused_has_stats(p, in_place);
            let (run, params) = fused(
                &mut case,
                label,
                p,
                (stats, in_place),
                Params { divisor, ..params },
            );
            launch(&mut case, fused_kernel(p, stats), params, run);
        }
        for run in &p.on_chip {
            on_chip(&mut case, p, run, Params { divisor, ..params }, &mut rows);
        }
        let tile_runs = p.tiles.iter();
        let tile_runs = tile_runs.map(|run| tiles(&mut case, p, run, Params { divisor, ..params }));
        let tiles = tile_runs.collect();
        let rank_runs = p.ranks.iter();
        let rank_runs = rank_runs.map(|run| ranks(&mut case, p, run, Params { divisor, ..params }));
        let ranks = rank_runs.collect();
        Self {
            case,
            rows,
            tiles,
            ranks,
            total_weight,
            reduced,
            reduced_of_all,
            class_error,
        }
    }
}

fn forward_kernel(p: &Problem, stats: bool, width: usize) -> (Kernel, Geometry) {
    let (element, softcap) = (p.element, p.softcap.is_some());
    match p.distribution {
        Some(_) => select::distribution_forward(element, softcap, width),
        None => select::forward_of_tile((element, stats, softcap), width),
    }
}

fn backward_kernel(p: &Problem, width: usize) -> (Kernel, Geometry) {
    let (element, softcap) = (p.element, p.softcap.is_some());
    match p.distribution {
        Some(_) => select::distribution_backward(element, softcap, width),
        None => select::backward(element, softcap, width),
    }
}

fn fused_kernel(p: &Problem, stats: bool) -> (Kernel, Geometry) {
    let (kind, shape) = ((p.element, stats, p.softcap.is_some()), (p.vocab, p.width));
    match p.distribution {
        Some(_) => select::distribution_loss_and_gradient(kind.0, kind.2, p.width, &H200),
        None => select::loss_and_gradient(kind, shape, &H200, Some(Forced::General))
            .expect("that can always be chosen"),
    }
}

fn states(case: &mut Case, p: &Problem) -> Buffer {
    let size = match p.distribution {
        Some(_) => size_of::<DistributionState>(),
        None => size_of::<RowState>(),
    };
    case.poisoned("state", p.rows() * size, 0)
}

/// The launches of an on-chip run: loss with gradient, a forward, and the backward that goes with that.
fn on_chip(case: &mut Case, p: &Problem, run: &OnChip, params: Params, rows: &mut Vec<RowRun>) {
    let (element, softcap) = (p.element, p.softcap.is_some());
    let shape = (p.vocab, p.width);
    let forced = Some(Forced::OnChip(Some(run.blocks_per_row)));
    let launch = |case: &mut Case, (kernel, mut geometry): (Kernel, Geometry), params| {
        // Rows that the crate would not take on chip are cut as finely as can be, so that slices have edges.
        if p.vocab * element.size() < select::SHORTEST_ON_CHIP {
            let groups = (p.vocab * element.size()).div_ceil(16);
            let slice = groups.div_ceil(run.blocks_per_row);
            geometry.groups_per_block = slice as u32;
            geometry.dynamic_shared = select::on_chip_dynamic_shared(slice) as u32;
        }
        let params = Params {
            blocks_per_row: geometry.blocks_per_row,
            groups_per_block: geometry.groups_per_block,
            ..params
        };
        let shape = Shape {
            grid: p.rows() as u32 * geometry.blocks_per_row,
            block: run.threads,
            cluster: geometry.blocks_per_row,
            dynamic_shared: geometry.dynamic_shared,
        };
        case.launch(kernel, params, shape);
    };
    let chosen = |choice: Result<_, String>| choice.unwrap_or_else(|error| panic!("{error}"));

    let place = if run.in_place { " in place" } else { "" };
    let label = format!("on chip, {} blocks a row{place}", run.blocks_per_row);
    let stats = fused_has_stats(p, run.in_place);
    let (row_run, fused_params) = fused(case, &label, p, (stats, run.in_place), params);
    rows.push(row_run);
    let kernel = select::loss_and_gradient((element, stats, softcap), shape, &H200, forced);
    launch(case, chosen(kernel), fused_params);
    // One of the two forwards, in turn.
    let stats = run.in_place;
    let (row_run, forward_params) =
        row_outputs(case, &format!("forward {label}"), p, stats, params);
    rows.push(row_run);
    let state = states(case, p);
    let forward_params = Params {
        state: state.start(),
        ..forward_params
    };
    let kernel = select::forward((element, stats, softcap), shape, &H200, forced);
    launch(case, chosen(kernel), forward_params);
    let params = Params {
        state: state.start(),
        ..params
    };
    let (grad, params) = gradient(case, p, false, params);
    rows.push(RowRun {
        label: format!("backward after {label}"),
        has_upstream: false,
        loss: None,
        grad: Some(grad),
        stats: None,
        predicted: None,
        first_error: None,
        differ: Vec::new(),
    });
    let (kernel, geometry) = select::backward(element, softcap, p.width);
    case.launch(
        kernel,
        params,
        Shape::plain(p.rows() as u32, geometry.threads),
    );
}

/// Loss, statistics and gradient from tiles, as `forward_linear` launches them.
fn tiles(case: &mut Case, p: &Problem, run: &Tiles, params: Params) -> RowRun {
    let element = p.element;
    let label = format!("tiles of {} rows and {} classes", run.rows, run.classes);
    let (mut row_run, params) = row_outputs(case, &label, p, run.stats, params);
    let (grad, params) = gradient(case, p, true, params);
    row_run.grad = Some(grad);
    let state = states(case, p);
    let running = case.poisoned("running", p.rows() * running_size(p), 0);
    let params = Params {
        state: state.start(),
        running: running.start(),
        ..params
    };
    let view = &p.logits_view;
    let rows = if view.sizes.len() == 1 {
        run.rows
    } else {
        p.rows()
    };
    let mut launch = |(kernel, geometry): (Kernel, Geometry), tile: Params| {
        let shape = Shape::plain(tile.rows as u32, geometry.threads);
        case.launch(kernel, tile, shape);
    };
    for backward in [false, true] {
        for first_row in (0..p.rows()).step_by(rows) {
            for first_column in (0..p.vocab).step_by(run.classes) {
                let end = first_column + run.classes;
                let last = end >= p.vocab;
                let width = if last { p.width } else { end } - first_column;
                let start = ((view.row(first_row) + first_column) * element.size()) as u64;
                let tile = Params {
                    logits: params.logits + start,
                    grad: params.grad + start,
                    rows: rows.min(p.rows() - first_row) as u64,
                    width: width as u32,
                    first_row: first_row as u32,
                    first_column: first_column as u32,
                    ..params
                };
                let kernel = match backward {
                    true => backward_kernel(p, width),
                    false => forward_kernel(p, run.stats, width),
                };
                launch(kernel, tile);
            }
        }
    }
    row_run
}

fn running_size(p: &Problem) -> usize {
    match p.distribution {
        Some(_) => size_of::<DistributionRunning>(),
        None => size_of::<Running>(),
    }
}

/// Loss, statistics and gradient from slices of the vocabulary, each of which a rank has; one memory stands for all of theirs.
fn ranks(case: &mut Case, p: &Problem, run: &Ranks, params: Params) -> RowRun {
    let Ranks {
        first_classes,
        tile,
        stats,
        altered,
    } = run;
    let label = format!("ranks from {first_classes:?} on, tiles of {tile}, {altered:?}");
    let (mut row_run, params) = row_outputs(case, &label, p, *stats, params);
    let (grad, params) = gradient(case, p, true, params);
    row_run.grad = Some(grad);
    row_run.differ = altered.map_or(Vec::new(), |altered| altered.rows(p));
    let state = states(case, p);
    let of_rank = p.rows() * running_size(p);
    let gathered = case.poisoned("gathered", first_classes.len() * of_rank, 0);
    let params = Params {
        state: state.start(),
        ranks: first_classes.len() as u32,
        ..params
    };
    let params = with_class_check(case, params);
    let altered = altered.map(|altered| {
        let given = Params {
            ranks: params.ranks,
            ..inputs(case, &altered.apply(p))
        };
        with_class_check(case, given)
    });
    for backward in [false, true] {
        for (rank, &first) in first_classes.iter().enumerate() {
            let after = first_classes.iter().copied().filter(|&other| other > first);
            let end = after.min().unwrap_or(p.vocab);
            let mut given = params;
            if let (Some(altered), 1, false) = (altered, rank, backward) {
                given.targets = altered.targets;
                given.smoothing = altered.smoothing;
                given.weights = altered.weights;
                given.entropy_weights = altered.entropy_weights;
                given.probabilities = altered.probabilities;
                given.class_weights = altered.class_weights;
                given.prior = altered.prior;
                given.class_check = altered.class_check;
            }
            if let Some(Target::Probabilities { element, .. }) =
                p.distribution.as_ref().map(|d| &d.target)
            {
                given.probabilities += (first * element.size()) as u64;
            }
            for first_column in (first..end).step_by(*tile) {
                let stop = (first_column + tile).min(end);
                // The next rank's classes are this one's padding, which a backward would overwrite.
                let beyond = match stop == end && !backward {
                    true => (stop + 2).min(p.width),
                    false => stop,
                };
                let width = if stop == p.vocab { p.width } else { beyond } - first_column;
                let start = (first_column * p.element.size()) as u64;
                let tile = Params {
                    logits: params.logits + start,
                    grad: params.grad + start,
                    running: gathered.at(rank * of_rank),
                    width: width as u32,
                    first_column: first_column as u32,
                    first_class: first as u32,
                    end_class: end as u32,
                    ..given
                };
                let (kernel, geometry) = match backward {
                    true => backward_kernel(p, width),
                    false => forward_kernel(p, *stats, width),
                };
                case.launch(
                    kernel,
                    tile,
                    Shape::plain(p.rows() as u32, geometry.threads),
                );
            }
        }
        if !backward {
            let softcap = p.softcap.is_some();
            let kernel = match p.distribution {
                Some(_) => Kernel::DistributionMerge { softcap },
                None => Kernel::Merge {
                    stats: *stats,
                    softcap,
                },
            };
            let params = Params {
                gathered: gathered.start(),
                ..params
            };
            case.launch(kernel, params, Shape::plain(p.rows() as u32, MERGE_THREADS));
        }
    }
    row_run
}

/// Looks at the classes' values, if there are any.
fn with_class_check(case: &mut Case, params: Params) -> Params {
    if params.class_weights == 0 && params.prior == 0 {
        return params;
    }
    let check = case.poisoned("class_check of ranks", size_of::<ClassCheck>(), 4);
    let params = Params {
        class_check: check.start(),
        ..params
    };
    let launched = Params {
        first_error: 0,
        ..params
    };
    case.launch(Kernel::Classes, launched, Shape::plain(1, REDUCE_THREADS));
    params
}

/// Which of the two kernels: in turn, in place and apart, from problem to problem.
fn fused_has_stats(p: &Problem, in_place: bool) -> bool {
    p.vocab.is_multiple_of(2) == in_place
}

/// Outputs of loss and gradient in one launch.
fn fused(
    case: &mut Case,
    label: &str,
    p: &Problem,
    (stats, in_place): (bool, bool),
    params: Params,
) -> (RowRun, Params) {
    let (mut run, params) = row_outputs(case, label, p, stats, params);
    let (grad, params) = gradient(case, p, in_place, params);
    run.grad = Some(grad);
    (run, params)
}

fn inputs(case: &mut Case, p: &Problem) -> Params {
    let logits = case.input("logits", &stored_logits(p), p.logits_view.offset);
    let targets = if p.targets_are_i64 {
        case.input("targets", &p.targets, 8)
    } else {
        case.input(
            "targets",
            &p.targets.iter().map(|&t| t as u32).collect::<Vec<_>>(),
            4,
        )
    };
    let (smoothing, uniform_smoothing) = match &p.eps {
        Eps::Uniform(eps) => (0, *eps),
        Eps::PerRow(eps) => (
            case.input("smoothing", &spread(eps, 3), 12).start(),
            f32::NAN,
        ),
    };
    let params = Params {
        logits: logits.start(),
        targets: targets.start(),
        entries: 1,
        smoothing,
        weights: p.weights.as_ref().map_or(0, |weights| {
            case.input("weights", &spread(weights, 2), 4).start()
        }),
        logits_rows: p.logits_view.abi(),
        grad_rows: p.grad_view.abi(),
        smoothing_rows: View::contiguous(p.rows(), 3).abi(),
        weight_rows: View::contiguous(p.rows(), 2).abi(),
        rows: p.rows() as u64,
        ignore_index: p.ignore_index(),
        vocab: p.vocab as u32,
        end_class: p.vocab as u32,
        width: p.width as u32,
        targets_are_i64: u32::from(p.targets_are_i64),
        mean: u32::from(p.mean),
        uniform_smoothing,
        z_loss: p.z_loss,
        logit_scale: p.logit_scale,
        softcap: p.softcap.unwrap_or(f32::NAN),
        inner: p
            .softcap
            .map_or([f32::NAN; 2], |cap| inner_factors(p.logit_scale, cap)),
        result_scale: p.result_scale,
        ..Params::zeroed()
    };
    distribution_inputs(case, p, params)
}

fn distribution_inputs(case: &mut Case, p: &Problem, mut params: Params) -> Params {
    let Some(distribution) = &p.distribution else {
        return params;
    };
    match &distribution.entropy_weight {
        Eps::Uniform(weight) => params.uniform_entropy_weight = *weight,
        Eps::PerRow(weights) => {
            params.entropy_weights = case.input("entropy_weight", &spread(weights, 4), 4).start();
            params.entropy_rows = View::contiguous(p.rows(), 4).abi();
            params.uniform_entropy_weight = f32::NAN;
        }
    }
    // Where a view of a longer vector may start.
    let mut of_classes = |name, values: &Option<Vec<f32>>, offset| {
        let values = values.as_ref();
        values.map_or(0, |values| case.input(name, values, offset).start())
    };
    params.class_weights = of_classes("class_weights", &distribution.class_weights, 0);
    params.prior = of_classes("prior", &distribution.prior, p.vocab % 4 * 4);
    match &distribution.target {
        Target::Class => {}
        Target::TopK {
            k,
            classes,
            probabilities,
        } => {
            params.targets = if p.targets_are_i64 {
                case.input("targets", classes, 8).start()
            } else {
                let classes: Vec<u32> = classes.iter().map(|&class| class as u32).collect();
                case.input("targets", &classes, 4).start()
            };
            params.entries = *k as u32;
            params.probabilities = case.input("probabilities", probabilities, 12).start();
        }
        Target::Probabilities {
            values,
            element,
            view,
        } => {
            params.targets = 0;
            params.entries = 0;
            params.probability_type = element.number();
            params.probability_rows = view.abi();
            let values = in_view(view, *element, values, (p.rows(), p.vocab, p.vocab));
            params.probabilities = case.input("probabilities", &values, view.offset).start();
        }
    }
    params
}

/// Values some elements apart, with NaN between them.
fn spread(values: &[f32], apart: usize) -> Vec<f32> {
    let gap = std::iter::repeat_n(f32::NAN, apart - 1);
    values
        .iter()
        .flat_map(|&value| std::iter::once(value).chain(gap.clone()))
        .collect()
}

fn stored_logits(p: &Problem) -> Vec<u8> {
    let shape = (p.rows(), p.vocab, p.width);
    in_view(&p.logits_view, p.element, &p.logits, shape)
}

/// Rows of `vocab` values where a view of `width` has them. Padding and the gaps between rows hold NaN: who reads them shows it.
fn in_view(
    view: &View,
    element: Element,
    values: &[f32],
    (rows, vocab, width): (usize, usize, usize),
) -> Vec<u8> {
    let mut stored = vec![f32::NAN; view.extent(rows, width)];
    for (i, row) in values.chunks(vocab).enumerate() {
        let begin = view.row(i);
        stored[begin..begin + vocab].copy_from_slice(row);
    }
    to_bytes(element, &stored)
}

fn row_outputs(
    case: &mut Case,
    label: &str,
    p: &Problem,
    stats: bool,
    params: Params,
) -> (RowRun, Params) {
    let loss = case.poisoned(&format!("loss of {label}"), p.rows() * 4, 4);
    let first_error = case.output(&format!("first_error of {label}"), &[u64::MAX], 8);
    let mut params = Params {
        loss: loss.start(),
        first_error: first_error.start(),
        ..params
    };
    let mut run = RowRun {
        label: label.into(),
        has_upstream: false,
        loss: Some(loss),
        grad: None,
        stats: None,
        predicted: None,
        first_error: Some(first_error),
        differ: Vec::new(),
    };
    if stats {
        let buffers = STATS.map(|name| case.poisoned(name, p.rows() * 4, 8));
        let predicted = case.poisoned("predicted", p.rows() * 4, 12);
        [
            params.nll,
            params.lse,
            params.entropy,
            params.max_prob,
            params.grad_norm_sq,
        ] = buffers.map(Buffer::start);
        params.predicted = predicted.start();
        run.stats = Some(buffers);
        run.predicted = Some(predicted);
    }
    (run, params)
}

fn gradient(
    case: &mut Case,
    p: &Problem,
    in_place: bool,
    params: Params,
) -> ((Buffer, View, Vec<u8>), Params) {
    let (view, initial) = if in_place {
        (p.logits_view.clone(), stored_logits(p))
    } else {
        let bytes = p.grad_view.extent(p.rows(), p.width) * p.element.size();
        (p.grad_view.clone(), vec![POISON; bytes])
    };
    let buffer = case.output(
        if in_place { "logits and grad" } else { "grad" },
        &initial,
        view.offset,
    );
    let logits = if in_place {
        buffer.start()
    } else {
        params.logits
    };
    let named = match p.distribution {
        Some(_) if params.entries > 0 => {
            let bytes = p.rows() * params.entries as usize * size_of::<NamedGradient>();
            case.poisoned("named", bytes, 8).start()
        }
        _ => 0,
    };
    let params = Params {
        logits,
        grad: buffer.start(),
        grad_rows: view.abi(),
        named,
        ..params
    };
    ((buffer, view, initial), params)
}
