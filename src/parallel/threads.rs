//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use candle_core::{Result, Tensor, bail};

use super::{
    Communicator,
    message::{check_alike, sum},
};

/// A group of `size` ranks that are threads of one process, in rank order: each thread takes one.
///
/// Sums are taken in rank order. Where a rank's communicator is dropped, and with it all that was cloned from it (the options of a
/// loss, and a loss with its graph), whoever waits for that rank gets an error: so a thread should own its communicator. They must
/// be threads of their own, not tasks of a pool, whose threads would wait for ranks that have not begun; and memory that a rank
/// has overwritten in place must be that rank's alone, as it is locked while the rank waits for others. Tensors on a GPU must be of
/// one candle `Device`, whose stream then orders what all do.
///
/// # Panics
/// If `size` is 0.
pub fn threads(size: usize) -> Vec<Arc<dyn Communicator>> {
    assert!(size > 0, "a group has at least one rank");
    let group = Arc::new(Group {
        round: Mutex::new(Round {
            given: vec![None; size],
            result: None,
            collected: vec![true; size],
            gone: None,
        }),
        changed: Condvar::new(),
    });
    (0..size)
        .map(|rank| {
            let group = group.clone();
            Arc::new(Thread { rank, size, group }) as Arc<dyn Communicator>
        })
        .collect()
}

struct Thread {
    rank: usize,
    size: usize,
    group: Arc<Group>,
}

struct Group {
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    given: Vec<Option<Tensor>>,
    /// What all gave, until all have collected it.
    result: Option<Arc<Vec<Tensor>>>,
    collected: Vec<bool>,
    gone: Option<usize>,
}

impl Thread {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.group.round.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, round: MutexGuard<'a, Round>) -> MutexGuard<'a, Round> {
        let waited = self.group.changed.wait(round);
        waited.unwrap_or_else(|e| e.into_inner())
    }

    /// What all ranks give.
    fn exchange(&self, local: &Tensor) -> Result<Arc<Vec<Tensor>>> {
        // A copy: its owner may overwrite it while others still read.
        let local = local.detach().copy()?;
        let mut round = self.lock();
        while round.result.is_some() && round.collected[self.rank] {
            round = self.wait(round); // others are still at the last one
        }
        round.given[self.rank] = Some(local);
        if round.given.iter().all(Option::is_some) {
            let given = round.given.iter_mut().filter_map(Option::take).collect();
            round.result = Some(Arc::new(given));
            round.collected.fill(false);
            self.group.changed.notify_all();
        }
        loop {
            if let Some(all) = &round.result {
                let all = all.clone();
                round.collected[self.rank] = true;
                if round.collected.iter().all(|collected| *collected) {
                    round.result = None;
                    self.group.changed.notify_all();
                }
                return Ok(all);
            }
            if let Some(rank) = round.gone {
                round.given[self.rank] = None;
                bail!("rank {rank} is gone: its communicator was dropped");
            }
            round = self.wait(round);
        }
    }

    fn exchange_alike(&self, local: &Tensor) -> Result<Arc<Vec<Tensor>>> {
        let all = self.exchange(local)?;
        let given: Vec<_> = all.iter().map(|t| (t.dtype(), t.dims())).collect();
        check_alike(&given)?;
        Ok(all)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.lock().gone.get_or_insert(self.rank);
        self.group.changed.notify_all();
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, local: &Tensor) -> Result<Tensor> {
        Tensor::stack(&self.exchange_alike(local)?, 0)
    }

    fn all_reduce_sum(&self, local: &Tensor) -> Result<Tensor> {
        sum(&self.exchange_alike(local)?)
    }
}
