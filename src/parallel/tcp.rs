//! Ranks that are processes, or threads, over TCP: a star, with rank 0 in the middle.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    path::Path,
    sync::Mutex,
    time::Duration,
};

use candle_core::{Device, Error, Result, Tensor, bail};

use super::{
    Communicator,
    message::{Header, Operation, check_headers, header, on_cpu, sum, with_values},
    rendezvous::{Answer, Rendezvous, error, gone, is_late, is_open},
};

/// A rank of processes (or threads) that find each other over TCP, for tensors on the CPU.
///
/// Everything passes through rank 0: this is for what the ranks of a loss tell each other, a message of 512 bytes or one of some bytes
/// a row, for tests, and to start ranks that exchange tensors otherwise. Gradients of a large model want MPI or NCCL. Types are
/// those of `Mpi`: f32, f64, f16, bf16, u8, u32, i64; tensors of up to 8 dimensions. Sums are taken in rank order.
///
/// A rank that ends, or drops its communicator, is an error on the others the next time they wait for it, within a second; after
/// that the group is of no use any more. Not seen is a machine that is gone without a word, and a rank that never calls.
///
/// It trusts the network: what is sent is neither encrypted nor signed, and whoever reaches the port can be a rank. All ranks run
/// the same version of this crate, on machines of one byte order.
///
/// ```no_run
/// # use std::{sync::Arc, time::Duration};
/// # use candle_cross_entropy::{CrossEntropy, parallel::Tcp};
/// # fn main() -> candle_core::Result<()> {
/// # let (rank, size) = (0, 2);
/// let ranks = Arc::new(Tcp::connect("node0:29500", rank, size, Duration::from_secs(60))?);
/// let loss = CrossEntropy::new().data_parallel(ranks);
/// # Ok(())
/// # }
/// ```
pub struct Tcp {
    rank: usize,
    size: usize,
    group: Mutex<Group>,
}

struct Group {
    /// Of rank 0 those to ranks 1, 2, …; of another rank the one to rank 0.
    streams: Vec<TcpStream>,
    /// Why there is no group any more.
    over: Option<String>,
}

impl Tcp {
    /// Rank 0 listens at the address, `host:port`, to which the others connect; returns once all ranks have come. Where the name
    /// of rank 0's host is not the others' name of it, rank 0 may give `0.0.0.0:port`.
    ///
    /// # Errors
    /// If the rank is not one of `size`, if another process has that rank or another number of ranks, and if not all ranks have
    /// come within `timeout`.
    pub fn connect(address: &str, rank: usize, size: usize, timeout: Duration) -> Result<Self> {
        let meeting = Rendezvous::new(rank, size, timeout)?;
        Ok(Self::of(rank, size, meeting.at(address)?))
    }

    /// Rank 0 listens at a free port of its machine, on all its networks, and writes its name and that port into the file for the
    /// others, which wait for it; it removes the file once all have come. A file that an earlier run has left is no harm, one of
    /// a run that still waits for its ranks is: so let the path have the run's name in it.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect), and if rank 0 cannot write the file.
    pub fn through_file(
        path: impl AsRef<Path>,
        rank: usize,
        size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let meeting = Rendezvous::new(rank, size, timeout)?;
        Ok(Self::of(rank, size, meeting.through_file(path.as_ref())?))
    }

    fn of(rank: usize, size: usize, streams: Vec<TcpStream>) -> Self {
        let over = None;
        let group = Mutex::new(Group { streams, over });
        Self { rank, size, group }
    }

    fn operation(&self, operation: Operation, local: &Tensor) -> Result<Tensor> {
        let Ok(mut group) = self.group.lock() else {
            bail!("TCP: an earlier operation has panicked");
        };
        if let Some(why) = &group.over {
            return Err(error(why));
        }
        match self.rank {
            0 => group.lead(operation, local),
            _ => group.follow(operation, local, self.size),
        }
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, local: &Tensor) -> Result<Tensor> {
        self.operation(Operation::AllGather, local)
    }

    fn all_reduce_sum(&self, local: &Tensor) -> Result<Tensor> {
        self.operation(Operation::AllReduceSum, local)
    }
}

/// An operation: each rank's header to rank 0, whose answer says whether all are alike; then their values, and the result or another
/// answer. Nobody sends values before all have come, so that none is left in the midst of sending.
impl Group {
    fn lead(&mut self, operation: Operation, local: &Tensor) -> Result<Tensor> {
        // A copy: the result may be of one rank, and what was given overwritten.
        let local = on_cpu(local).and_then(|local| local.copy());
        let mut headers = vec![header(operation, local.as_ref().ok())];
        for rank in 1..=self.streams.len() {
            match self.read_header(rank) {
                Ok(header) => headers.push(header),
                Err(why) => return Err(self.end(why)),
            }
        }
        let alike = check_headers(&headers);
        if let Some(why) = self.tell(&alike) {
            return Err(self.end(why));
        }
        let local = local?;
        alike?;
        let (dtype, mut lost) = (local.dtype(), None);
        let mut all = vec![Ok(local.clone())];
        for (rank, stream) in (1..).zip(&mut self.streams) {
            let mut bytes = vec![0; local.elem_count() * dtype.size_in_bytes()];
            if let Err(e) = read(stream, &mut bytes, || Ok(())) {
                lost.get_or_insert(gone(rank, &e));
            }
            all.push(Tensor::from_raw_buffer(
                &bytes,
                dtype,
                local.dims(),
                &Device::Cpu,
            ));
        }
        if let Some(why) = lost {
            return Err(self.end(why));
        }
        let all: Result<Vec<Tensor>> = all.into_iter().collect();
        let result = all.and_then(|all| match operation {
            Operation::AllGather => Tensor::stack(&all, 0),
            Operation::AllReduceSum => sum(&all),
        });
        // A rank that is lost is told of to the others behind the values that they wait for.
        let mut lost = self.tell(&result);
        if let Ok(result) = &result {
            for (rank, stream) in (1..).zip(&mut self.streams) {
                if let Err(e) = send(stream, result)? {
                    lost.get_or_insert(gone(rank, &e));
                }
            }
        }
        match lost {
            Some(why) => Err(self.end(why)),
            None => result,
        }
    }

    fn follow(&mut self, operation: Operation, local: &Tensor, size: usize) -> Result<Tensor> {
        let local = on_cpu(local);
        // If it fails, the last words of rank 0 say more.
        let _ = self.streams[0].write_all(bytemuck::cast_slice(&header(
            operation,
            local.as_ref().ok(),
        )));
        let answer = self.hear();
        let local = local?;
        answer?;
        if let Err(e) = send(&mut self.streams[0], &local)? {
            self.hear()?;
            return Err(self.leave(gone(0, &e)));
        }
        self.hear()?;
        let dims = match operation {
            Operation::AllGather => [&[size], local.dims()].concat(),
            Operation::AllReduceSum => local.dims().to_vec(),
        };
        let count: usize = dims.iter().product();
        let mut bytes = vec![0; count * local.dtype().size_in_bytes()];
        if let Err(e) = read(&mut self.streams[0], &mut bytes, || Ok(())) {
            return Err(self.leave(gone(0, &e)));
        }
        Tensor::from_raw_buffer(&bytes, local.dtype(), &dims, &Device::Cpu)
    }

    /// What a rank says of its tensor. While it says nothing, whether another one has gone.
    fn read_header(&self, rank: usize) -> std::result::Result<Header, String> {
        let mut header: Header = [0; _];
        let mut lost = None;
        let look = || {
            for (other, stream) in (1..).zip(&self.streams) {
                if let Err(e) = is_open(stream) {
                    lost = Some(gone(other, &e));
                    return Err(e);
                }
            }
            Ok(())
        };
        let bytes = bytemuck::cast_slice_mut(&mut header);
        let result = read(&mut &self.streams[rank - 1], bytes, look);
        match result {
            Ok(()) => Ok(header),
            Err(e) => Err(lost.unwrap_or_else(|| gone(rank, &e))),
        }
    }

    /// Rank 0's answer to all; the rank, if any, that does not hear it.
    fn tell<T>(&self, result: &Result<T>) -> Option<String> {
        let answer = match result {
            Ok(_) => Answer::Yes,
            Err(error) => Answer::No(error.to_string().lines().next().unwrap_or_default().into()),
        };
        let mut lost = None;
        for (rank, stream) in (1..).zip(&self.streams) {
            if let Err(e) = answer.write(stream) {
                lost.get_or_insert(gone(rank, &e));
            }
        }
        lost
    }

    /// Another rank's view of it.
    fn hear(&mut self) -> Result<()> {
        match Answer::read(&mut self.streams[0]) {
            Ok(Answer::Yes) => Ok(()),
            Ok(Answer::No(why)) => Err(Error::Msg(why)),
            Ok(Answer::Over(why)) => Err(self.leave(why)),
            Err(e) => Err(self.leave(gone(0, &e))),
        }
    }

    /// Rank 0's end of the group, of which the others hear.
    fn end(&mut self, why: String) -> Error {
        for stream in &self.streams {
            let _ = Answer::Over(why.clone()).write(stream);
        }
        self.leave(why)
    }

    fn leave(&mut self, why: String) -> Error {
        self.streams.clear();
        error(self.over.insert(why))
    }
}

/// The values of a tensor, contiguous. The outer error is of this rank's own making.
fn send(stream: &mut TcpStream, tensor: &Tensor) -> Result<io::Result<()>> {
    with_values!(tensor, values: F32 | F64 | F16 | BF16 | U8 | U32 | I64 =>
        Ok(stream.write_all(bytemuck::cast_slice(values))))
}

/// Reads all of it; `look` is called whenever the stream's time is over, and may end it.
fn read(
    stream: &mut impl Read,
    mut bytes: &mut [u8],
    mut look: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = &mut bytes[count..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if is_late(&e) => look()?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
