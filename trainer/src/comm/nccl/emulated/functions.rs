//! The functions of the table.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use super::super::library::{Code, ID_BYTES, IN_PROGRESS, Library, RawStream, SUCCESS};
use super::clique::{Address, Call, Clique, INVALID_USAGE, Kind, Message, Split, width};
use super::queue::Worker;

/// `ncclInvalidArgument`.
const INVALID_ARGUMENT: Code = 4;

/// How often a call is found to be in progress before it is done.
const POLLS: u32 = 2;

/// One rank of a communicator: what a handle points to. Handles are never freed, so that one that is
/// used too late is noticed.
struct Rank {
    clique: Arc<Clique>,
    rank: usize,
    local: Mutex<Local>,
}

#[derive(Default)]
struct Local {
    /// Operations so far.
    operations: u64,
    /// Those of them that all ranks take part in.
    collectives: u64,
    splits: u64,
    polls: u32,
    /// A split under way: its number, and where the new communicator goes.
    splitting: Option<(u64, usize)>,
    leaving: bool,
    gone: Option<&'static str>,
    last_error: String,
}

/// Communicators of a world under way, by their identifier.
static WORLDS: Mutex<Option<HashMap<[c_char; ID_BYTES], Arc<Clique>>>> = Mutex::new(None);

/// Sends and receives of a group.
#[derive(Default)]
struct Group {
    depth: usize,
    ranks: Vec<usize>,
    sends: Vec<Message>,
    receives: Vec<Message>,
    stream: usize,
    failed: Option<Code>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

/// The table.
pub(in super::super) fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library {
        get_version,
        get_unique_id,
        init,
        split,
        finalize,
        destroy,
        abort,
        async_error,
        error_string,
        last_error,
        all_reduce,
        reduce_scatter,
        all_gather,
        broadcast,
        send,
        recv,
        group_start,
        group_end,
    })
}

/// What tests do to a rank behind its back.
pub(in super::super) mod control {
    use super::*;

    /// Operations of this rank do not end any more.
    pub(in super::super::super) fn hang(handle: ncclComm_t) {
        let rank = of(handle);
        rank.clique.hang(rank.rank);
    }

    /// This rank is told that a peer has gone.
    pub(in super::super::super) fn fail(handle: ncclComm_t, reason: &str) {
        const REMOTE_ERROR: Code = 6;
        let rank = of(handle);
        rank.clique.tell(rank.rank, REMOTE_ERROR, reason);
    }

    /// Operations of this rank so far.
    pub(in super::super::super) fn operations(handle: ncclComm_t) -> u64 {
        of(handle).local.lock().unwrap().operations
    }
}

fn of(handle: ncclComm_t) -> &'static Rank {
    // SAFETY: handles come from `handle_of`, which leaks what they point to.
    unsafe { &*handle.cast::<Rank>() }
}

fn handle_of(clique: Arc<Clique>, rank: usize) -> ncclComm_t {
    clique.lock().made += 1;
    let rank = Rank {
        clique,
        rank,
        local: Mutex::default(),
    };
    Box::into_raw(Box::new(rank)).cast()
}

impl Rank {
    /// Refuses a call.
    fn refuse(&self, code: Code, reason: &str) -> Code {
        self.local.lock().unwrap().last_error = reason.to_owned();
        eprintln!("misuse of NCCL on rank {}: {reason}", self.rank);
        self.clique.tell(self.rank, code, reason);
        code
    }

    /// Refuses a call on a communicator that is gone or busy.
    fn begin(&self) -> Result<(), Code> {
        let (gone, busy) = {
            let local = self.local.lock().unwrap();
            let busy = local.polls > 0 || local.splitting.is_some() || local.leaving;
            (local.gone, busy)
        };
        match gone {
            Some(how) => Err(self.refuse(INVALID_ARGUMENT, how)),
            None if busy => Err(self.refuse(INVALID_USAGE, "a call before is in progress")),
            None => Ok(()),
        }
    }

    /// Says that the call goes on for a while.
    fn go_on(&self) -> Code {
        self.local.lock().unwrap().polls = POLLS;
        IN_PROGRESS
    }

    /// Counts an operation; its number among those of all ranks if it is one.
    fn count(&self, of_all: bool) -> u64 {
        let mut local = self.local.lock().unwrap();
        local.operations += 1;
        local.collectives += u64::from(of_all);
        local.collectives
    }

    fn collective(
        &'static self,
        call: Call,
        [send, recv]: [(usize, usize); 2],
        in_place: usize,
        stream: RawStream,
    ) -> Code {
        if let Err(code) = self.begin() {
            return code;
        }
        // In place, or apart.
        if recv.0 != in_place && overlap(send, recv) {
            return self.refuse(INVALID_USAGE, "it receives where it sends from");
        }
        let number = self.count(true);
        let (send, recv) = (Address(send.0), Address(recv.0));
        // SAFETY: streams are the workers of lanes, which outlive their calls.
        let worker = unsafe { &*stream.cast::<Worker>() };
        worker.push(move || self.clique.meet(self.rank, number, call, send, recv));
        self.go_on()
    }
}

fn overlap((a, a_bytes): (usize, usize), (b, b_bytes): (usize, usize)) -> bool {
    a < b + b_bytes && b < a + a_bytes && a_bytes > 0 && b_bytes > 0
}

unsafe extern "C" fn get_version(version: *mut c_int) -> Code {
    // SAFETY: the caller's number.
    unsafe { *version = 22_809 };
    SUCCESS
}

unsafe extern "C" fn get_unique_id(id: *mut ncclUniqueId) -> Code {
    static NEXT: Mutex<u64> = Mutex::new(0);
    let mut next = NEXT.lock().unwrap();
    *next += 1;
    let mut internal = [7; ID_BYTES];
    for (at, byte) in next.to_ne_bytes().into_iter().enumerate() {
        internal[at] = byte as c_char;
    }
    // SAFETY: the caller's identifier.
    unsafe { *id = ncclUniqueId { internal } };
    SUCCESS
}

unsafe extern "C" fn init(
    slot: *mut ncclComm_t,
    size: c_int,
    id: ncclUniqueId,
    rank: c_int,
    settings: *mut ncclConfig_t,
) -> Code {
    // SAFETY: the caller's settings.
    let settings = unsafe { *settings };
    assert_eq!((settings.size, settings.magic), (80, 0xcafe_beef));
    assert_eq!((settings.blocking, settings.minCTAs), (0, c_int::MIN));
    let clique = {
        let mut worlds = WORLDS.lock().unwrap();
        let worlds = worlds.get_or_insert_default();
        let fresh = || Clique::new(size as usize);
        Arc::clone(worlds.entry(id.internal).or_insert_with(fresh))
    };
    assert_eq!(clique.size, size as usize);
    // SAFETY: the caller's slot.
    unsafe { *slot = handle_of(clique, rank as usize) };
    IN_PROGRESS
}

unsafe extern "C" fn split(
    parent: ncclComm_t,
    colour: c_int,
    key: c_int,
    slot: *mut ncclComm_t,
    _settings: *mut ncclConfig_t,
) -> Code {
    let rank = of(parent);
    if let Err(code) = rank.begin() {
        return code;
    }
    let mut local = rank.local.lock().unwrap();
    let number = local.splits;
    local.splits += 1;
    local.splitting = Some((number, slot as usize));
    let mut state = rank.clique.lock();
    let split = state.splits.entry(number).or_insert_with(|| Split {
        wishes: vec![None; rank.clique.size],
        ..Split::default()
    });
    split.wishes[rank.rank] = Some((colour, key));
    IN_PROGRESS
}

/// Ends a split that all ranks have come to.
fn end_split(rank: &Rank, local: &mut Local) {
    let Some((number, slot)) = local.splitting else {
        return;
    };
    let mut state = rank.clique.lock();
    let split = state.splits.get_mut(&number).unwrap();
    let wishes: Option<Vec<(i32, i32)>> = split.wishes.iter().copied().collect();
    let Some(wishes) = wishes else { return };
    let (colour, key) = wishes[rank.rank];
    local.splitting = None;
    if colour < 0 {
        return;
    }
    let members = || wishes.iter().filter(|wish| wish.0 == colour);
    assert_eq!(members().filter(|wish| wish.1 == key).count(), 1, "keys");
    let clique = split.cliques.entry(colour);
    let clique = clique.or_insert_with(|| Clique::new(members().count()));
    let place = members().filter(|wish| wish.1 < key).count();
    // SAFETY: the slot stays until it is filled.
    unsafe { *(slot as *mut ncclComm_t) = handle_of(Arc::clone(clique), place) };
}

unsafe extern "C" fn async_error(handle: ncclComm_t, code: *mut Code) -> Code {
    let rank = of(handle);
    let mut local = rank.local.lock().unwrap();
    if let Some(how) = local.gone {
        drop(local);
        return rank.refuse(INVALID_ARGUMENT, how);
    }
    end_split(rank, &mut local);
    let polls = local.polls;
    local.polls = polls.saturating_sub(1);
    let state = rank.clique.lock();
    let unmade = state.made < rank.clique.size;
    let staying = local.leaving && state.left < rank.clique.size;
    drop(state);
    let busy = polls > 0 || local.splitting.is_some() || unmade || staying;
    let said = match rank.clique.error(rank.rank) {
        Some((failed, reason)) => {
            local.last_error = reason;
            failed
        }
        None if busy => IN_PROGRESS,
        None => SUCCESS,
    };
    // SAFETY: the caller's number.
    unsafe { *code = said };
    SUCCESS
}

unsafe extern "C" fn finalize(handle: ncclComm_t) -> Code {
    let rank = of(handle);
    if let Err(code) = rank.begin() {
        return code;
    }
    rank.local.lock().unwrap().leaving = true;
    rank.clique.lock().left += 1;
    IN_PROGRESS
}

unsafe extern "C" fn destroy(handle: ncclComm_t) -> Code {
    let rank = of(handle);
    let mut local = rank.local.lock().unwrap();
    assert!(
        local.leaving && local.gone.is_none(),
        "destroyed early or twice"
    );
    local.gone = Some("it is used after it was destroyed");
    SUCCESS
}

unsafe extern "C" fn abort(handle: ncclComm_t) -> Code {
    let rank = of(handle);
    let gone = &mut rank.local.lock().unwrap().gone;
    assert!(gone.is_none(), "aborted twice, or after it was destroyed");
    *gone = Some("it is used after it was aborted");
    rank.clique.abort(rank.rank);
    SUCCESS
}

unsafe extern "C" fn error_string(code: Code) -> *const c_char {
    let text = match code {
        4 => c"invalid argument",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

unsafe extern "C" fn last_error(handle: ncclComm_t) -> *const c_char {
    if handle.is_null() {
        return std::ptr::null();
    }
    let text = of(handle).local.lock().unwrap().last_error.clone();
    // Tests fail a few times.
    CString::new(text).unwrap().into_raw()
}

unsafe extern "C" fn all_reduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: ncclDataType_t,
    _sum: ncclRedOp_t,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let (send, recv) = (send as usize, recv as usize);
    let call = Call {
        kind: Kind::AllReduce,
        count,
        data_type,
    };
    let bytes = count * width(data_type);
    of(handle).collective(call, [(send, bytes), (recv, bytes)], send, stream)
}

unsafe extern "C" fn reduce_scatter(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: ncclDataType_t,
    _sum: ncclRedOp_t,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let (rank, send, recv) = (of(handle), send as usize, recv as usize);
    let call = Call {
        kind: Kind::ReduceScatter,
        count,
        data_type,
    };
    let bytes = count * width(data_type);
    let memory = [(send, bytes * rank.clique.size), (recv, bytes)];
    rank.collective(call, memory, send + rank.rank * bytes, stream)
}

unsafe extern "C" fn all_gather(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: ncclDataType_t,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let (rank, send, recv) = (of(handle), send as usize, recv as usize);
    let call = Call {
        kind: Kind::AllGather,
        count,
        data_type,
    };
    let bytes = count * width(data_type);
    let memory = [(send, bytes), (recv, bytes * rank.clique.size)];
    rank.collective(call, memory, send - rank.rank * bytes, stream)
}

unsafe extern "C" fn broadcast(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    data_type: ncclDataType_t,
    root: c_int,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let (send, recv) = (send as usize, recv as usize);
    let root = root as usize;
    let call = Call {
        kind: Kind::Broadcast { root },
        count,
        data_type,
    };
    let bytes = count * width(data_type);
    of(handle).collective(call, [(send, bytes), (recv, bytes)], send, stream)
}

/// Adds a message to the thread's group, or makes a group of it alone.
fn message(
    handle: ncclComm_t,
    stream: RawStream,
    message: Message,
    list: fn(&mut Group) -> &mut Vec<Message>,
) -> Code {
    let alone = GROUP.with_borrow(|group| group.depth == 0);
    if alone {
        GROUP.with_borrow_mut(|group| group.depth = 1);
    }
    let begun = of(handle).begin();
    GROUP.with_borrow_mut(|group| match begun {
        Ok(()) => {
            group.ranks.push(handle as usize);
            group.stream = stream as usize;
            list(group).push(message);
        }
        Err(code) => group.failed = Some(code),
    });
    if alone {
        end_group()
    } else {
        begun.err().unwrap_or(SUCCESS)
    }
}

unsafe extern "C" fn send(
    memory: *const c_void,
    count: usize,
    data_type: ncclDataType_t,
    peer: c_int,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let sent = Message {
        peer: peer as usize,
        memory: Address(memory as usize),
        count,
        data_type,
    };
    message(handle, stream, sent, |group| &mut group.sends)
}

unsafe extern "C" fn recv(
    memory: *mut c_void,
    count: usize,
    data_type: ncclDataType_t,
    peer: c_int,
    handle: ncclComm_t,
    stream: RawStream,
) -> Code {
    let received = Message {
        peer: peer as usize,
        memory: Address(memory as usize),
        count,
        data_type,
    };
    message(handle, stream, received, |group| &mut group.receives)
}

unsafe extern "C" fn group_start() -> Code {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

unsafe extern "C" fn group_end() -> Code {
    end_group()
}

fn end_group() -> Code {
    let group = GROUP.with_borrow_mut(std::mem::take);
    assert_eq!(group.depth, 1, "groups are not nested");
    if let Some(code) = group.failed {
        return code;
    }
    let Some(&handle) = group.ranks.first() else {
        return SUCCESS;
    };
    assert!(
        group.ranks.iter().all(|&one| one == handle),
        "one communicator"
    );
    let rank = of(handle as ncclComm_t);
    let memory = |message: &Message| (message.memory.0, message.bytes());
    for (at, receive) in group.receives.iter().enumerate() {
        let others = group.receives[at + 1..].iter().chain(&group.sends);
        if others
            .map(memory)
            .any(|other| overlap(memory(receive), other))
        {
            return rank.refuse(INVALID_USAGE, "a group receives where it sends or receives");
        }
    }
    rank.count(false);
    let (sends, receives) = (group.sends, group.receives);
    // SAFETY: streams are the workers of lanes, which outlive their calls.
    let worker = unsafe { &*(group.stream as *const Worker) };
    worker.push(move || rank.clique.exchange(rank.rank, &sends, &receives));
    rank.go_on()
}
