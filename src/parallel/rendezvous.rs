//! How ranks that are processes find each other: all come to rank 0.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::{BuildHasher, Hasher},
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use candle_core::{Error, Result};

pub(super) fn error(why: impl AsRef<str>) -> Error {
    Error::Msg(format!("TCP: {}", why.as_ref())).bt()
}

pub(super) fn gone(rank: usize, e: &io::Error) -> String {
    match e.kind() {
        ErrorKind::UnexpectedEof => format!("rank {rank} is gone"),
        _ => format!("rank {rank} is gone: {e}"),
    }
}

/// Ahead of what a rank says first, which is this, a token, its rank and how many there are. It counts up when the protocol changes.
const MAGIC: u64 = u64::from_be_bytes(*b"cce tcp1");

/// Between attempts.
const PAUSE: Duration = Duration::from_millis(10);
/// Within which one who connects says who it is.
const HELLO: Duration = Duration::from_secs(1);
/// Within which one who is connected to, or one of several before it, answers.
const ANSWER: Duration = Duration::from_secs(5);
/// Rank 0 looks for ranks that have gone while it waits for one.
const LOOK: Duration = Duration::from_millis(250);

/// A rank that has yet to find the others.
pub(super) struct Rendezvous {
    rank: usize,
    size: usize,
    begin: Instant,
    timeout: Duration,
}

/// Where rank 0 may be.
type Place = (u64, Vec<String>);

impl Rendezvous {
    pub fn new(rank: usize, size: usize, timeout: Duration) -> Result<Self> {
        if rank >= size {
            return Err(error(format!("rank {rank} of {size}, must be below it")));
        }
        let begin = Instant::now();
        Ok(Self {
            rank,
            size,
            begin,
            timeout,
        })
    }

    /// Of rank 0 the streams to ranks 1, 2, …; of another rank the one to rank 0.
    pub fn at(&self, address: &str) -> Result<Vec<TcpStream>> {
        match self.rank {
            _ if self.size == 1 => Ok(Vec::new()),
            0 => self.accept(&listen(address)?, 0),
            _ => self.join(|| Ok((0, vec![address.into()]))),
        }
    }

    /// The same; the address is in the file.
    pub fn through_file(&self, path: &Path) -> Result<Vec<TcpStream>> {
        match self.rank {
            _ if self.size == 1 => Ok(Vec::new()),
            0 => {
                let listener = listen("0.0.0.0:0")?;
                // By which others see that they have not found a later user of an earlier run's port.
                let token = RandomState::new().build_hasher().finish();
                write_place(path, token, &listener)
                    .map_err(|e| error(format!("cannot write {}: {e}", path.display())))?;
                let streams = self.accept(&listener, token);
                let _ = fs::remove_file(path);
                streams
            }
            _ => self.join(|| read_place(path)),
        }
    }

    fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.begin.elapsed())
    }

    /// Rank 0: the streams to all others, once they have come. Who is not one of them is refused.
    fn accept(&self, listener: &TcpListener, token: u64) -> Result<Vec<TcpStream>> {
        let io = |e: io::Error| error(format!("cannot listen: {e}"));
        listener.set_nonblocking(true).map_err(io)?;
        let mut streams: Vec<Option<TcpStream>> = (1..self.size).map(|_| None).collect();
        let mut refused = String::new();
        while streams.iter().any(Option::is_none) {
            if self.left().is_zero() {
                let missing: Vec<usize> = (1..self.size)
                    .filter(|rank| streams[rank - 1].is_none())
                    .collect();
                let why = format!(
                    "ranks {missing:?} of {} did not come within {:?}{refused}",
                    self.size, self.timeout
                );
                for stream in streams.iter().flatten() {
                    let _ = Answer::No(why.clone()).write(stream);
                }
                return Err(error(why));
            }
            match listener.accept() {
                Ok((stream, from)) => {
                    if let Err(why) = self.admit(stream, token, &mut streams) {
                        refused = format!("; {from} was refused: {why}");
                    }
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
        let streams: Vec<TcpStream> = streams.into_iter().flatten().collect();
        for (rank, stream) in (1..).zip(&streams) {
            let ready = Answer::Yes.write(stream);
            let ready = ready.and_then(|()| stream.set_read_timeout(Some(LOOK)));
            ready.map_err(|e| error(gone(rank, &e)))?;
        }
        Ok(streams)
    }

    /// Takes one who has connected among the streams, or says why not, to it too.
    fn admit(
        &self,
        stream: TcpStream,
        token: u64,
        streams: &mut [Option<TcpStream>],
    ) -> std::result::Result<(), String> {
        let hello = || -> io::Result<[u64; 4]> {
            let mut hello = [0; 4];
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(HELLO))?;
            (&stream).read_exact(bytemuck::cast_slice_mut(&mut hello))?;
            Ok(hello)
        };
        let answer = match hello() {
            Ok([MAGIC, its, rank, size]) if its == token => {
                let place = (rank as usize).checked_sub(1);
                let place = place.and_then(|place| streams.get_mut(place));
                match place {
                    _ if size != self.size as u64 => Answer::No(format!(
                        "rank {rank} is of {size} ranks, rank 0 of {}",
                        self.size
                    )),
                    None => Answer::No(format!("no rank {rank} joins rank 0 of {}", self.size)),
                    // One that has given up, as a rank before it took long to say who it is, may come again.
                    Some(Some(other)) if is_open(other).is_ok() => {
                        Answer::No(format!("there is a rank {rank} already"))
                    }
                    Some(place) => {
                        Answer::Yes.write(&stream).map_err(|e| e.to_string())?;
                        *place = Some(stream);
                        return Ok(());
                    }
                }
            }
            Ok([MAGIC, ..]) => Answer::Over("rank 0 of another run".into()),
            Ok(_) => Answer::No("not a rank, or one of another version or byte order".into()),
            Err(e) => Answer::No(format!("said too little: {e}")),
        };
        let _ = answer.write(&stream);
        match answer {
            Answer::No(why) | Answer::Over(why) => Err(why),
            Answer::Yes => Ok(()),
        }
    }

    /// Another rank: the stream to rank 0, once all have come. It need not be there yet.
    fn join(&self, place: impl Fn() -> io::Result<Place>) -> Result<Vec<TcpStream>> {
        loop {
            let mut last = String::new();
            match place() {
                Ok((token, addresses)) => {
                    for address in addresses {
                        match self.ask(&address, token) {
                            Ok(stream) => return self.wait_for_all(stream),
                            Err(Answer::No(why)) => return Err(error(why)),
                            Err(Answer::Over(why)) => last += &format!(", {address}: {why}"),
                            Err(Answer::Yes) => unreachable!("not a refusal"),
                        }
                    }
                }
                Err(e) => last = format!(", {e}"),
            }
            if self.left().is_zero() {
                return Err(error(format!(
                    "rank {} did not find rank 0 within {:?}{last}",
                    self.rank, self.timeout
                )));
            }
            thread::sleep(PAUSE);
        }
    }

    /// A stream to rank 0 of this group, if it is that. `Over` if not, `No` if it does not want this rank.
    fn ask(&self, address: &str, token: u64) -> std::result::Result<TcpStream, Answer> {
        let hello = [MAGIC, token, self.rank as u64, self.size as u64];
        let asked = || -> io::Result<(TcpStream, Answer)> {
            let limit = self.left().clamp(PAUSE, HELLO);
            let mut stream = Err(ErrorKind::NotFound.into());
            for address in address.to_socket_addrs()? {
                stream = TcpStream::connect_timeout(&address, limit);
                if stream.is_ok() {
                    break;
                }
            }
            let mut stream: TcpStream = stream?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.write_all(bytemuck::cast_slice(&hello))?;
            let answer = Answer::read(&mut stream)?;
            Ok((stream, answer))
        };
        match asked() {
            Ok((stream, Answer::Yes)) => Ok(stream),
            Ok((_, refusal)) => Err(refusal),
            Err(e) => Err(Answer::Over(e.to_string())),
        }
    }

    fn wait_for_all(&self, mut stream: TcpStream) -> Result<Vec<TcpStream>> {
        // Rank 0, whose time may have begun later, says who is missing.
        let limit = self.left() + HELLO;
        let answer = stream
            .set_read_timeout(Some(limit))
            .and_then(|()| Answer::read(&mut stream));
        let ready = match answer {
            Ok(Answer::Yes) => stream.set_read_timeout(None),
            Ok(Answer::No(why) | Answer::Over(why)) => return Err(error(why)),
            Err(e) => Err(e),
        };
        match ready {
            Ok(()) => Ok(vec![stream]),
            Err(e) if is_late(&e) => Err(error(format!(
                "other ranks did not come within {:?}",
                self.timeout
            ))),
            Err(e) => Err(error(gone(0, &e))),
        }
    }
}

fn listen(address: &str) -> Result<TcpListener> {
    TcpListener::bind(address).map_err(|e| error(format!("cannot listen at {address}: {e}")))
}

/// The token, and by which names this machine's port may be reached, a line each; whole as soon as it is there.
fn write_place(path: &Path, token: u64, listener: &TcpListener) -> io::Result<()> {
    let port = listener.local_addr()?.port();
    let mut text = format!("{token}\nlocalhost:{port}\n");
    if let Ok(host) = fs::read_to_string("/proc/sys/kernel/hostname") {
        text += &format!("{}:{port}\n", host.trim());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{token:x}"));
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

fn read_place(path: &Path) -> io::Result<Place> {
    let text = fs::read_to_string(path)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    let mut lines = text.lines();
    let token = lines.next().and_then(|token| token.parse().ok());
    let token = token.ok_or(ErrorKind::InvalidData)?;
    Ok((token, lines.map(String::from).collect()))
}

pub(super) fn is_late(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// An error if the other end has closed it.
pub(super) fn is_open(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let next = stream.peek(&mut [0]);
    stream.set_nonblocking(false)?;
    match next {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Err(e) if !is_late(&e) => Err(e),
        _ => Ok(()),
    }
}

/// What rank 0 says to the others.
pub(super) enum Answer {
    Yes,
    No(String),
    /// The group is of no use any more; to a rank that asks to join: this is not its group.
    Over(String),
}

impl Answer {
    /// Longer ones are cut.
    const MAX_BYTES: usize = 1 << 16;

    pub fn write(&self, mut stream: &TcpStream) -> io::Result<()> {
        let (kind, text) = match self {
            Self::Yes => (0, ""),
            Self::No(why) => (1, why.as_str()),
            Self::Over(why) => (2, why.as_str()),
        };
        let text = &text.as_bytes()[..text.len().min(Self::MAX_BYTES)];
        let words = [kind, text.len() as u32];
        stream.write_all(&[bytemuck::cast_slice(&words), text].concat())
    }

    pub fn read(stream: &mut TcpStream) -> io::Result<Self> {
        let mut words = [0u32; 2];
        stream.read_exact(bytemuck::cast_slice_mut(&mut words))?;
        let length = words[1] as usize;
        if words[0] > 2 || length > Self::MAX_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut text = vec![0; length];
        stream.read_exact(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(match words[0] {
            0 => Self::Yes,
            1 => Self::No(text),
            _ => Self::Over(text),
        })
    }
}
