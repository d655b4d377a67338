//! The ranks of a communicator, and how their operations meet.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use cudarc::nccl::sys::ncclDataType_t;

use super::super::library::Code;

/// `ncclInvalidUsage`.
pub(super) const INVALID_USAGE: Code = 5;

/// What an operation of all ranks is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast { root: usize },
}

/// What all ranks must have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) kind: Kind,
    /// Elements, as the call counts them.
    pub(super) count: usize,
    pub(super) data_type: ncclDataType_t,
}

/// Memory of a rank. It is kept as long as the operation is under way, as that of a GPU must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address(pub(super) usize);

/// One message of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) peer: usize,
    pub(super) memory: Address,
    pub(super) count: usize,
    pub(super) data_type: ncclDataType_t,
}

impl Message {
    pub(super) fn bytes(&self) -> usize {
        self.count * width(self.data_type)
    }
}

/// Bytes of an element.
pub(super) fn width(data_type: ncclDataType_t) -> usize {
    match data_type {
        ncclDataType_t::ncclUint8 => 1,
        ncclDataType_t::ncclBfloat16 => 2,
        ncclDataType_t::ncclFloat32 => 4,
        ncclDataType_t::ncclFloat64 | ncclDataType_t::ncclInt64 => 8,
        other => panic!("no lane carries {other:?}"),
    }
}

/// The ranks of a communicator.
pub(super) struct Clique {
    pub(super) size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    /// Ranks that have come to the making of it.
    pub(super) made: usize,
    /// Ranks that have begun to leave.
    pub(super) left: usize,
    aborted: Vec<bool>,
    /// Ranks whose operations never end by themselves.
    hung: Vec<bool>,
    /// What a rank has been told of a failure.
    errors: Vec<Option<(Code, String)>>,
    rounds: HashMap<u64, Round>,
    /// Messages by sender and receiver.
    letters: HashMap<(usize, usize), VecDeque<Letter>>,
    pub(super) splits: HashMap<u64, Split>,
}

/// An operation that ranks are coming to.
struct Round {
    posts: Vec<Option<(Call, Address, Address)>>,
    done: bool,
    left: usize,
}

struct Letter {
    message: Message,
    taken: Arc<Mutex<bool>>,
}

/// A split that ranks are coming to: colour and key of each.
#[derive(Default)]
pub(super) struct Split {
    pub(super) wishes: Vec<Option<(i32, i32)>>,
    /// The communicators that come of it, by colour.
    pub(super) cliques: HashMap<i32, Arc<Clique>>,
}

impl Clique {
    pub(super) fn new(size: usize) -> Arc<Self> {
        let state = State {
            aborted: vec![false; size],
            hung: vec![false; size],
            errors: vec![None; size],
            ..State::default()
        };
        Arc::new(Self {
            size,
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn error(&self, rank: usize) -> Option<(Code, String)> {
        self.lock().errors[rank].clone()
    }

    /// Tells `rank` of a failure.
    pub(super) fn tell(&self, rank: usize, code: Code, reason: &str) {
        self.lock().errors[rank].get_or_insert((code, reason.to_owned()));
        self.changed.notify_all();
    }

    pub(super) fn hang(&self, rank: usize) {
        self.lock().hung[rank] = true;
    }

    /// Ends what `rank` has under way.
    pub(super) fn abort(&self, rank: usize) {
        self.lock().aborted[rank] = true;
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap()
    }

    /// Whether `rank` may go on, once it is not held up.
    fn begin(&self, rank: usize) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while state.hung[rank] && !state.aborted[rank] {
            state = self.wait(state);
        }
        (!state.aborted[rank]).then_some(state)
    }

    /// Meets the other ranks in operation `number`. The last to come does it for all.
    pub(super) fn meet(&self, rank: usize, number: u64, call: Call, send: Address, recv: Address) {
        let Some(mut state) = self.begin(rank) else {
            return;
        };
        let round = state.rounds.entry(number).or_insert_with(|| Round {
            posts: vec![None; self.size],
            done: false,
            left: 0,
        });
        round.posts[rank] = Some((call, send, recv));
        let posts: Option<Vec<_>> = round.posts.iter().copied().collect();
        if let Some(posts) = posts {
            round.done = true;
            if let Some(other) = posts.iter().position(|post| post.0 != posts[0].0) {
                let reason = format!(
                    "ranks do different things: rank 0 {:?}, rank {other} {:?}",
                    posts[0].0, posts[other].0
                );
                for error in &mut state.errors {
                    error.get_or_insert((INVALID_USAGE, reason.clone()));
                }
            } else {
                perform(&posts);
            }
            self.changed.notify_all();
        }
        while !state.aborted[rank] && !state.rounds[&number].done {
            state = self.wait(state);
        }
        let round = state.rounds.get_mut(&number).unwrap();
        if round.done {
            round.left += 1;
            if round.left == self.size {
                state.rounds.remove(&number);
            }
        } else {
            // Its memory may go.
            round.posts[rank] = None;
        }
    }

    /// Sends and receives at once.
    pub(super) fn exchange(&self, rank: usize, sends: &[Message], receives: &[Message]) {
        let Some(mut state) = self.begin(rank) else {
            return;
        };
        let mut sent = Vec::new();
        for &message in sends {
            let taken = Arc::new(Mutex::new(false));
            sent.push(Arc::clone(&taken));
            let box_ = state.letters.entry((rank, message.peer)).or_default();
            box_.push_back(Letter { message, taken });
        }
        self.changed.notify_all();
        let mut receives = receives.to_vec();
        loop {
            receives.retain(|receive| {
                let letters = state.letters.entry((receive.peer, rank)).or_default();
                let Some(Letter { message, taken }) = letters.pop_front() else {
                    return true;
                };
                let fits = (message.count, message.data_type) == (receive.count, receive.data_type);
                if fits {
                    // SAFETY: the sender's memory is kept until the letter is taken or withdrawn
                    // under the lock that is held here, the receiver's until its job is done.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            message.memory.0 as *const u8,
                            receive.memory.0 as *mut u8,
                            receive.bytes(),
                        );
                    }
                } else {
                    let reason = format!("sent are {message:?}, received {receive:?}");
                    for rank in [rank, receive.peer] {
                        state.errors[rank].get_or_insert((INVALID_USAGE, reason.clone()));
                    }
                }
                *taken.lock().unwrap() = true;
                self.changed.notify_all();
                false
            });
            if receives.is_empty() && sent.iter().all(|taken| *taken.lock().unwrap()) {
                return;
            }
            if state.aborted[rank] {
                for letters in state
                    .letters
                    .iter_mut()
                    .filter(|((from, _), _)| *from == rank)
                {
                    letters.1.clear();
                }
                return;
            }
            state = self.wait(state);
        }
    }
}

/// Does what all ranks have come for.
fn perform(posts: &[(Call, Address, Address)]) {
    let (call, ..) = posts[0];
    let size = posts.len();
    let bytes = call.count * width(call.data_type);
    let read = |address: Address, bytes: usize| {
        // SAFETY: the ranks keep their memory until they have been through this operation, and none
        // of them works on it.
        unsafe { std::slice::from_raw_parts(address.0 as *const u8, bytes) }.to_vec()
    };
    let write = |address: Address, values: &[u8]| {
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), address.0 as *mut u8, values.len());
        }
    };
    match call.kind {
        Kind::AllReduce => {
            let given: Vec<_> = posts.iter().map(|post| read(post.1, bytes)).collect();
            let sum = sum(&given, call.data_type);
            posts.iter().for_each(|post| write(post.2, &sum));
        }
        Kind::ReduceScatter => {
            let given: Vec<_> = posts
                .iter()
                .map(|post| read(post.1, bytes * size))
                .collect();
            let sum = sum(&given, call.data_type);
            for (post, sum) in posts.iter().zip(sum.chunks_exact(bytes.max(1))) {
                write(post.2, sum);
            }
        }
        Kind::AllGather => {
            let all: Vec<u8> = posts.iter().flat_map(|post| read(post.1, bytes)).collect();
            posts.iter().for_each(|post| write(post.2, &all));
        }
        Kind::Broadcast { root } => {
            let given = read(posts[root].1, bytes);
            posts.iter().for_each(|post| write(post.2, &given));
        }
    }
}

/// In rank order.
fn sum(given: &[Vec<u8>], data_type: ncclDataType_t) -> Vec<u8> {
    macro_rules! sum {
        ($float:ty, $width:literal) => {{
            let value = |bytes: &[u8]| <$float>::from_ne_bytes(bytes.try_into().unwrap());
            let mut sums: Vec<$float> = given[0].chunks_exact($width).map(value).collect();
            for contribution in &given[1..] {
                let values = contribution.chunks_exact($width).map(value);
                sums.iter_mut()
                    .zip(values)
                    .for_each(|(sum, value)| *sum += value);
            }
            sums.iter().flat_map(|sum| sum.to_ne_bytes()).collect()
        }};
    }
    match data_type {
        ncclDataType_t::ncclFloat32 => sum!(f32, 4),
        ncclDataType_t::ncclFloat64 => sum!(f64, 8),
        other => panic!("no lane sums {other:?} by NCCL"),
    }
}
