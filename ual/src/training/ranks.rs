//! Processes that train one model together: each has all weights and takes its part of every batch, or some classes of the output
//! projection; gradients are summed.

use std::{env, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use candle_cross_entropy::parallel::Communicator;

use crate::{
    data::samples::Sample,
    training::{args, slice::Slice},
};

/// This process's place among those that train with it.
pub struct Ranks {
    comm: Option<Arc<dyn Communicator>>,
    by_classes: bool,
    /// Outlives the communicator, as fields are dropped in their order.
    #[cfg(feature = "mpi")]
    universe: Option<mpi::environment::Universe>,
}

/// Numbers of gradients that are summed at a time: 16 MiB.
const BUCKET: usize = 1 << 22;

impl Ranks {
    /// No others.
    pub fn alone() -> Self {
        Self {
            comm: None,
            by_classes: false,
            #[cfg(feature = "mpi")]
            universe: None,
        }
    }

    /// Those of a group.
    pub fn of(comm: Arc<dyn Communicator>) -> Self {
        Self {
            comm: Some(comm),
            ..Self::alone()
        }
    }

    /// Those that `mpirun` or `srun` started with this one.
    pub fn launched() -> Result<Self> {
        if launched() <= 1 {
            return Ok(Self::alone());
        }
        #[cfg(feature = "mpi")]
        {
            use mpi::traits::Communicator as _;
            let universe = mpi::initialize().context("MPI is initialised already")?;
            // Whoever panics would wait, in MPI's own end, for the others, and they for it.
            let say = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                say(panic);
                mpi::topology::SimpleCommunicator::world().abort(1);
            }));
            let world = universe.world().duplicate();
            ensure!(
                world.size() > 1,
                "started as one of several processes, but MPI finds no other"
            );
            Ok(Self {
                comm: Some(Arc::new(candle_cross_entropy::parallel::Mpi::new(world))),
                universe: Some(universe),
                ..Self::alone()
            })
        }
        #[cfg(not(feature = "mpi"))]
        bail!(
            "started as one of {} processes, but this program was compiled without MPI: add --features mpi to cargo's",
            launched()
        )
    }

    /// What `--device` names. Of several processes with `cuda` each has a GPU of its own: which, goes by their numbers among those of
    /// one machine.
    pub fn device(&self, name: &str) -> Result<Device> {
        match local_rank().filter(|_| name == "cuda" && self.size() > 1) {
            Some(rank) => args::device(&format!("cuda:{rank}")),
            None => args::device(name),
        }
    }

    /// Makes tensors of the device pass between the processes: those of a GPU over NCCL.
    pub fn connect(&mut self, device: &Device) -> Result<()> {
        if device.is_cpu() {
            return Ok(());
        }
        if let Some(comm) = &mut self.comm {
            #[cfg(feature = "nccl")]
            {
                *comm = Arc::new(candle_cross_entropy::parallel::Nccl::new(
                    comm.clone(),
                    device,
                )?);
            }
            #[cfg(not(feature = "nccl"))]
            bail!(
                "process {} of several on GPUs, but this program was compiled without NCCL: add --features nccl to cargo's",
                comm.rank()
            );
        }
        Ok(())
    }

    /// Whether each takes some classes of the output projection instead of a part of every batch.
    pub fn by_classes(self, on: bool) -> Self {
        Self {
            by_classes: on,
            ..self
        }
    }

    /// This process's classes of a vocabulary; none where there are no others, or each takes a part of every batch.
    pub fn slice(&self, vocabulary: usize) -> Result<Option<Slice>> {
        let Some(comm) = self.comm.as_ref().filter(|_| self.by_classes) else {
            return Ok(None);
        };
        ensure!(
            comm.size() <= vocabulary,
            "--vocab-parallel: {} processes, but the model has {vocabulary} tokens",
            comm.size()
        );
        Ok(Some(Slice::new(comm.clone(), vocabulary)))
    }

    pub fn size(&self) -> usize {
        self.comm.as_ref().map_or(1, |comm| comm.size())
    }

    pub fn rank(&self) -> usize {
        self.comm.as_ref().map_or(0, |comm| comm.rank())
    }

    /// Whether this is the one that writes and reports.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Ends the others too, which would wait for this one.
    pub fn abort(&self) {
        #[cfg(feature = "mpi")]
        if let Some(universe) = &self.universe {
            use mpi::traits::Communicator as _;
            universe.world().abort(1);
        }
    }

    /// This process's part of a batch: none where there are fewer samples than processes. All of it where each has some classes.
    pub fn part<'a>(&self, batch: &[&'a Sample]) -> Vec<&'a Sample> {
        if self.by_classes {
            return batch.to_vec();
        }
        let mine = batch.iter().skip(self.rank()).step_by(self.size());
        mine.copied().collect()
    }

    /// Gradients and numbers summed over all processes, with the same bits on each. A variable that has a gradient anywhere has
    /// one everywhere.
    pub fn sum(
        &self,
        gradients: Option<GradStore>,
        numbers: &mut [f64],
        vars: &[Var],
    ) -> Result<GradStore> {
        let Some(comm) = &self.comm else {
            return gradients.context("a step has a batch");
        };
        let device = vars.first().context("nothing is trained")?.device();
        let mut gradients = match gradients {
            Some(gradients) => gradients,
            None => Tensor::new(0f32, device)?.backward()?, // the only way to an empty one
        };
        let has = |var: &Var| f64::from(u8::from(gradients.get(var).is_some()));
        let mut counts = numbers.to_vec();
        counts.extend(vars.iter().map(has));
        let length = counts.len();
        let counts = Tensor::from_vec(counts, length, &Device::Cpu)?;
        let counts = comm.all_reduce_sum(&counts)?.to_vec1::<f64>()?;
        let (sums, counts) = counts.split_at(numbers.len());
        numbers.copy_from_slice(sums);
        let vars = vars.iter().zip(counts);
        let vars: Vec<&Var> = vars
            .filter(|(_, n)| **n > 0.0)
            .map(|(var, _)| var)
            .collect();
        let mut start = 0;
        while start < vars.len() {
            let (mut end, mut count) = (start, 0);
            while end < vars.len() && (end == start || count + vars[end].elem_count() <= BUCKET) {
                count += vars[end].elem_count();
                end += 1;
            }
            let bucket = &vars[start..end];
            let flat = bucket.iter().map(|var| match gradients.get(var) {
                Some(gradient) => gradient.detach().flatten_all()?.to_dtype(DType::F32),
                None => Tensor::zeros(var.elem_count(), DType::F32, device),
            });
            let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
            let sums = comm.all_reduce_sum(&Tensor::cat(&flat, 0)?)?;
            let mut at = 0;
            for var in bucket {
                let sum = sums.narrow(0, at, var.elem_count())?.reshape(var.shape())?;
                gradients.insert(var, sum.to_dtype(var.dtype())?.copy()?);
                at += var.elem_count();
            }
            start = end;
        }
        Ok(gradients)
    }

    /// A number of the first process.
    pub fn number_of_first(&self, number: usize) -> Result<usize> {
        let number = Tensor::new(&[number as i64], &Device::Cpu)?;
        Ok(self.of_first(&number)?.to_vec1::<i64>()?[0] as usize)
    }

    /// A tensor of the first process, which all have of one shape.
    pub fn of_first(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(match &self.comm {
            None => tensor.clone(),
            Some(comm) if self.is_first() => comm.all_reduce_sum(tensor)?,
            Some(comm) => comm.all_reduce_sum(&tensor.zeros_like()?)?,
        })
    }

    /// An error on all processes if `what`, of which `text` says all, is not the same on all of them.
    pub fn check_alike(&self, what: &str, text: &str) -> Result<()> {
        let Some(comm) = &self.comm else {
            return Ok(());
        };
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (text, self.by_classes).hash(&mut hasher);
        let digest = Tensor::new(&[hasher.finish() as i64], &Device::Cpu)?;
        let all = comm.all_gather(&digest)?.flatten_all()?.to_vec1::<i64>()?;
        if let Some(rank) = all.iter().position(|digest| *digest != all[0]) {
            bail!("process {rank} has other {what} than process 0");
        }
        Ok(())
    }
}

/// How many processes were started, as Open MPI, MPICH and Slurm say.
fn launched() -> usize {
    number_in(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]).unwrap_or(1)
}

/// This process's number among those on its machine, as Open MPI, MPICH and Slurm say.
fn local_rank() -> Option<usize> {
    number_in(&[
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ])
}

/// That of the first of these variables of the environment that has one.
fn number_in(names: &[&str]) -> Option<usize> {
    let number = |name: &&str| env::var(name).ok()?.parse().ok();
    names.iter().find_map(number)
}

/// For what one process does.
pub fn refuse(command: &str) -> Result<()> {
    ensure!(
        launched() <= 1,
        "ual {command} is one process; {} were started",
        launched()
    );
    Ok(())
}
