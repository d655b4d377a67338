//! The whole watchdog over loopback, with short times.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::handshake::{ANSWER_BYTES, Secret, Transcript};
use super::*;

/// Generous: the machine may be busy with anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// Times that let nothing happen by itself; each test shortens what it is about.
fn settings() -> Settings {
    Settings {
        heartbeat: Duration::from_millis(20),
        lease: PATIENCE,
        hang_timeout: 3 * PATIENCE,
        start_timeout: 3 * PATIENCE,
        stop_grace: 3 * PATIENCE,
        save_timeout: PATIENCE,
        join_timeout: PATIENCE,
        end_wait: Duration::from_secs(2),
        interface: None,
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// What the hooks of a rank have recorded.
#[derive(Clone, Default)]
struct Record {
    exits: Arc<Mutex<Vec<String>>>,
    abandoned: Arc<Mutex<Vec<u64>>>,
    waits_for: Arc<Mutex<Option<String>>>,
    dumps: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Record {
    fn hooks(&self) -> Hooks {
        let (abandoned, waits_for) = (self.abandoned.clone(), self.waits_for.clone());
        let dumps = self.dumps.clone();
        Hooks {
            exit: self.exit(),
            on_abandon: Arc::new(move |step| lock(&abandoned).push(step)),
            waits_for: Arc::new(move || lock(&waits_for).clone()),
            dump: Arc::new(move || {
                dumps.fetch_add(1, Ordering::Relaxed);
            }),
        }
    }

    fn exit(&self) -> ExitHook {
        let exits = self.exits.clone();
        Arc::new(move |reason| lock(&exits).push(reason.to_owned()))
    }

    fn exits(&self) -> Vec<String> {
        lock(&self.exits).clone()
    }

    /// The one reason to exit, once there is one.
    fn exit_reason(&self) -> String {
        eventually("the exit hook is called", || !lock(&self.exits).is_empty());
        let exits = self.exits();
        assert_eq!(exits.len(), 1, "{exits:?}");
        exits[0].clone()
    }
}

struct Run {
    invitation: Invitation,
    records: Vec<Record>,
    /// In a box each, so that tests can take them away.
    ranks: Vec<Option<Watchdog>>,
}

impl Run {
    /// A host for `world` ranks, of which the first `joined` are there.
    fn start(world: usize, joined: usize, settings: &Settings) -> Self {
        let records: Vec<Record> = (0..world).map(|_| Record::default()).collect();
        let host = Host::open(world, true, settings, records[0].exit()).unwrap();
        let bytes = host.invitation().to_bytes();
        let invitation = Invitation::from_bytes(&bytes).unwrap();
        let mut host = Some(host);
        let ranks = (0..joined).map(|rank| {
            let (hooks, stop) = (records[rank].hooks(), records[rank].stop.clone());
            let host = host.take();
            Watchdog::join(&invitation, host, rank, world, settings, hooks, stop).ok()
        });
        let ranks: Vec<Option<Watchdog>> = ranks.collect();
        assert!(ranks.iter().all(Option::is_some));
        Self {
            invitation,
            records,
            ranks,
        }
    }

    fn rank(&self, rank: usize) -> &Watchdog {
        self.ranks[rank].as_ref().unwrap()
    }

    fn leave(mut self) {
        let leaving: Vec<_> = self
            .ranks
            .iter_mut()
            .filter_map(Option::take)
            .map(|rank| thread::spawn(move || rank.leave()))
            .collect();
        for rank in leaving {
            rank.join().unwrap();
        }
        for record in &self.records {
            assert_eq!(record.exits(), Vec::<String>::new());
        }
    }

    fn connect(&self, rank: usize, world: usize, settings: &Settings) -> TcpLink {
        TcpLink::connect(&self.invitation, rank, world, settings).unwrap()
    }
}

#[test]
fn a_dead_rank_ends_the_run_everywhere() {
    let mut run = Run::start(3, 3, &settings());
    drop(run.ranks[2].take());
    for record in &run.records[..2] {
        let line = record.exit_reason();
        assert!(line.starts_with("watchdog: lost rank 2 ("), "{line}");
        assert!(line.contains("its connection closed"), "{line}");
        let pid = format!("pid {})", std::process::id());
        assert!(line.contains(&pid), "{line}");
        assert_eq!(record.dumps.load(Ordering::Relaxed), 0);
    }
    assert_eq!(run.records[2].exits(), Vec::<String>::new());
}

#[test]
fn a_silent_rank_ends_the_run_although_its_connection_stands() {
    let mut settings = settings();
    settings.lease = Duration::from_secs(1);
    let run = Run::start(3, 2, &settings);
    let mut silent = run.connect(2, 3, &settings);
    let state = FromRank::State(Pulse::default().read());
    silent.send(&state).unwrap();
    let line = run.records[0].exit_reason();
    assert!(line.starts_with("watchdog: lost rank 2 "), "{line}");
    assert!(line.contains("no word from it for "), "{line}");
    drop(silent);
}

#[test]
fn a_stall_names_the_rank_that_is_waited_for_and_shows_stacks() {
    let mut settings = settings();
    settings.hang_timeout = Duration::from_secs(1);
    let run = Run::start(3, 3, &settings);
    for (rank, record) in run.records.iter().enumerate() {
        run.rank(rank).pulse().step(17);
        run.rank(rank).pulse().phase(Phase::Backward);
        if rank != 1 {
            *lock(&record.waits_for) = Some("reduce-scatter on lane 4".into());
        }
    }
    for record in &run.records {
        let line = record.exit_reason();
        assert!(line.starts_with("watchdog: lost rank 1 ("), "{line}");
        assert!(
            line.ends_with(
                "in backward of step 17, while 2 ranks wait in reduce-scatter on lane 4"
            ),
            "{line}"
        );
        assert_eq!(record.dumps.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn progress_is_no_stall() {
    let mut settings = settings();
    settings.hang_timeout = Duration::from_secs(2);
    let run = Run::start(2, 2, &settings);
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        for rank in 0..2 {
            run.rank(rank).pulse().phase(Phase::Forward);
            run.rank(rank).pulse().progress();
        }
        thread::sleep(Duration::from_millis(20));
    }
    run.leave();
}

#[test]
fn who_does_not_know_the_secret_cannot_join() {
    let mut short = settings();
    short.join_timeout = Duration::from_millis(200);
    let run = Run::start(2, 1, &settings());
    let stranger = Invitation {
        secret: Secret([0; 32]),
        ..run.invitation.clone()
    };
    let error = TcpLink::connect(&stranger, 1, 2, &short)
        .unwrap_err()
        .to_string();
    assert!(error.contains("rank 1 cannot reach rank 0"), "{error}");
    // Nor as a rank that is there, or of another world.
    assert!(TcpLink::connect(&run.invitation, 0, 2, &short).is_err());
    assert!(TcpLink::connect(&run.invitation, 1, 3, &short).is_err());
    assert!(TcpLink::connect(&run.invitation, 2, 2, &short).is_err());
    // The run is unharmed, and the right rank gets in.
    let record = &run.records[1];
    let settings = settings();
    let (hooks, stop) = (record.hooks(), record.stop.clone());
    let joined = Watchdog::join(&run.invitation, None, 1, 2, &settings, hooks, stop).unwrap();
    let mut run = run;
    run.ranks.push(Some(joined));
    run.leave();
}

#[test]
fn a_false_rank_0_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let invitation = Invitation {
        addresses: vec![listener.local_addr().unwrap()],
        secret: Secret([7; 32]),
    };
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(&[1; 32]);
            let _ = stream.read_exact(&mut [0; ANSWER_BYTES]);
            let _ = stream.write_all(&[2; 32]);
        }
    });
    let mut settings = settings();
    settings.join_timeout = Duration::from_millis(100);
    let error = TcpLink::connect(&invitation, 1, 2, &settings)
        .unwrap_err()
        .to_string();
    assert!(error.contains("is not rank 0 of this run"), "{error}");
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let run = Run::start(2, 2, &settings());
    let address = run.invitation.addresses[0];
    for garbage in [vec![0; 1], vec![0xff; 104], vec![b'x'; 100_000]] {
        let mut stream = TcpStream::connect(address).unwrap();
        let _ = stream.write_all(&garbage);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        if garbage.len() >= ANSWER_BYTES {
            let mut nonce = [0; 32];
            stream.read_exact(&mut nonce).unwrap();
            let mut more = Vec::new();
            // The end, or a reset where unread bytes were left.
            let ended = stream.read_to_end(&mut more);
            assert!(ended.is_err() || more.is_empty(), "{more:?}");
        }
    }
    // A few dozen strangers at the door keep nobody out.
    let strangers: Vec<_> = (0..40).map(|_| TcpStream::connect(address)).collect();
    run.rank(1).request_stop("still here");
    eventually("the run goes on", || {
        run.records[0].stop.load(Ordering::Relaxed)
    });
    drop(strangers);
    run.leave();
}

#[test]
fn a_rank_that_sends_nonsense_is_lost() {
    let settings = settings();
    let run = Run::start(2, 1, &settings);
    let mut link = run.connect(1, 2, &settings);
    link.send(&FromRank::Here {
        host: "node9".into(),
        pid: 5,
    })
    .unwrap();
    link.send_raw(&u32::MAX.to_le_bytes());
    let line = run.records[0].exit_reason();
    assert!(
        line.starts_with("watchdog: lost rank 1 (node9, pid 5)"),
        "{line}"
    );
}

#[test]
fn a_request_to_stop_reaches_every_rank() {
    let run = Run::start(3, 3, &settings());
    run.rank(1).request_stop("the disk is nearly full");
    for (rank, record) in run.records.iter().enumerate() {
        eventually("the flag is set", || record.stop.load(Ordering::Relaxed));
        let reason = run.rank(rank).stop_reason();
        assert_eq!(reason.as_deref(), Some("the disk is nearly full"));
    }
    run.leave();
}

#[test]
fn a_flag_set_on_one_rank_reaches_every_rank() {
    let run = Run::start(3, 3, &settings());
    run.records[2].stop.store(true, Ordering::Relaxed);
    for (rank, record) in run.records.iter().enumerate() {
        eventually("the flag is set", || record.stop.load(Ordering::Relaxed));
        eventually("with the reason", || run.rank(rank).stop_reason().is_some());
        assert_eq!(run.rank(rank).stop_reason().unwrap(), "rank 2 was asked to");
    }
    run.leave();
}

#[test]
fn a_step_that_does_not_end_is_abandoned_on_all_ranks_alike() {
    let mut settings = settings();
    settings.stop_grace = Duration::from_millis(100);
    let run = Run::start(3, 3, &settings);
    for rank in 0..3 {
        let pulse = run.rank(rank).pulse();
        pulse.begin(4).unwrap();
        pulse.submit_control(5).unwrap();
        pulse.step(6);
        pulse.phase(Phase::Forward);
    }
    // Rank 1 is through with its part of step 6, the others are not.
    run.rank(1).pulse().submit_control(6).unwrap();
    run.rank(0).request_stop("time");
    for (rank, record) in run.records.iter().enumerate() {
        let pulse = run.rank(rank).pulse();
        assert_eq!(pulse.wait_for_abandon(PATIENCE), Some(5));
        assert!(pulse.must_abandon(6) && !pulse.must_abandon(5));
        assert_eq!(pulse.submit_control(6).is_ok(), rank == 1);
        eventually("the hook", || *lock(&record.abandoned) == [5]);
    }
    // Not before all have saved.
    run.rank(1).saved(5);
    run.rank(2).saved(5);
    assert!(!run.rank(0).wait_for_parts(Duration::from_millis(100)));
    run.rank(0).saved(5);
    assert!(run.rank(0).wait_for_parts(PATIENCE));
    assert_eq!(run.rank(1).wait_for_leave(Duration::from_millis(50)), None);
    run.rank(0).committed(Ok(()));
    for rank in 0..3 {
        let departure = run.rank(rank).wait_for_leave(PATIENCE).unwrap();
        assert!(departure.complete, "{}", departure.detail);
    }
    // From here on nobody misses anybody, whoever goes first.
    let mut run = run;
    drop(run.ranks[0].take());
    thread::sleep(Duration::from_millis(100));
    run.leave();
}

#[test]
fn a_save_that_fails_lets_all_leave_without() {
    let mut settings = settings();
    settings.stop_grace = Duration::ZERO;
    let run = Run::start(2, 2, &settings);
    for rank in 0..2 {
        run.rank(rank).pulse().begin(0).unwrap();
        run.rank(rank).pulse().phase(Phase::Data);
    }
    run.rank(0).request_stop("time");
    assert_eq!(run.rank(1).pulse().wait_for_abandon(PATIENCE), Some(0));
    run.rank(1).save_failed(0, "disk full");
    for rank in 0..2 {
        let departure = run.rank(rank).wait_for_leave(PATIENCE).unwrap();
        assert_eq!(departure.detail, "rank 1 could not save: disk full");
        assert!(!departure.complete);
    }
    assert!(!run.rank(0).wait_for_parts(PATIENCE));
    run.leave();
}

#[test]
fn a_step_that_ends_in_time_is_not_abandoned() {
    let mut settings = settings();
    settings.stop_grace = Duration::from_secs(1);
    let run = Run::start(2, 2, &settings);
    for rank in 0..2 {
        run.rank(rank).pulse().phase(Phase::Forward);
    }
    run.rank(1).request_stop("time");
    eventually("the flag", || run.records[1].stop.load(Ordering::Relaxed));
    for rank in 0..2 {
        run.rank(rank).pulse().phase(Phase::Save);
    }
    thread::sleep(Duration::from_secs(2));
    for rank in 0..2 {
        assert_eq!(run.rank(rank).pulse().abandoned(), None);
        assert_eq!(run.rank(rank).pulse().submit_control(1), Ok(()));
    }
    run.leave();
}

#[test]
fn a_goodbye_is_no_death() {
    let mut run = Run::start(3, 3, &settings());
    run.ranks[1].take().unwrap().leave();
    thread::sleep(Duration::from_millis(300));
    run.rank(2).request_stop("still here");
    eventually("the others go on", || {
        run.records[0].stop.load(Ordering::Relaxed)
    });
    run.leave();
}

#[test]
fn when_rank_0_vanishes_every_other_rank_exits() {
    let mut run = Run::start(3, 3, &settings());
    drop(run.ranks[0].take());
    for (rank, record) in run.records.iter().enumerate().skip(1) {
        let line = record.exit_reason();
        assert_eq!(
            parse_verdict(&line).map(|(rank, _)| rank),
            Some(0),
            "{line}"
        );
        let end = format!("rank {rank} cannot go on without it");
        assert!(
            line.contains("connection") && line.ends_with(&end),
            "{line}"
        );
    }
}

#[test]
fn when_rank_0_stops_answering_the_lease_runs_out() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let invitation = Invitation {
        addresses: vec![listener.local_addr().unwrap()],
        secret: Secret([7; 32]),
    };
    let secret = invitation.secret.clone();
    let (release, released) = mpsc::channel::<()>();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[1; 32]).unwrap();
        let mut answer = [0; ANSWER_BYTES];
        stream.read_exact(&mut answer).unwrap();
        let seen = Transcript::verify_answer(&secret, [1; 32], &answer).unwrap();
        stream.write_all(&seen.confirmation(&secret)).unwrap();
        // Stopped: the connection stands, nothing is answered.
        let _ = released.recv();
    });
    let mut settings = settings();
    settings.lease = Duration::from_secs(1);
    let record = Record::default();
    let (hooks, stop) = (record.hooks(), record.stop.clone());
    let watchdog = Watchdog::join(&invitation, None, 1, 2, &settings, hooks, stop).unwrap();
    let line = record.exit_reason();
    assert!(
        line.starts_with("watchdog: lost rank 0 (at 127.0.0.1:"),
        "{line}"
    );
    assert!(line.contains("no word from it for "), "{line}");
    release.send(()).unwrap();
    host.join().unwrap();
    drop(watchdog);
}

#[test]
fn slow_ranks_are_offered_on_rank_0() {
    let run = Run::start(2, 2, &settings());
    for step in 0..16 {
        for (rank, own) in [(0, 0.5), (1, 1.0)] {
            run.rank(rank).pulse().step(step);
            run.rank(rank).pulse().busy_seconds(own);
        }
    }
    let found = Mutex::new(Vec::new());
    eventually("the slow rank is found", || {
        lock(&found).extend(run.rank(0).take_slow());
        !lock(&found).is_empty()
    });
    assert_eq!(lock(&found)[0].rank, 1);
    assert!(run.rank(1).take_slow().is_empty());
    run.leave();
}

/// Hands an invitation to a process.
const INVITATION: &str = "OXITRON_TEST_INVITATION";

/// Rank 1 of a test, as a process of its own: says that it is there, and stays.
#[test]
#[ignore = "started by another test, as a process of its own"]
fn rank_1_as_a_process() {
    let Ok(bytes) = std::env::var(INVITATION) else {
        println!("skipped: no {INVITATION}");
        return;
    };
    let bytes: Vec<u8> = serde_json::from_str(&bytes).unwrap();
    let invitation = Invitation::from_bytes(&bytes).unwrap();
    let hooks = Hooks::new(Arc::new(|_| {}));
    let stop = Arc::new(AtomicBool::new(false));
    let rank = Watchdog::join(&invitation, None, 1, 2, &settings(), hooks, stop).unwrap();
    rank.request_stop("here");
    thread::sleep(2 * PATIENCE);
}

#[test]
fn a_killed_process_is_dead_and_a_stopped_one_silent() {
    for (signal, words) in [
        ("KILL", "its connection closed"),
        ("STOP", "no word from it for "),
    ] {
        let mut settings = settings();
        settings.lease = Duration::from_secs(3);
        let run = Run::start(2, 1, &settings);
        let bytes = run.invitation.to_bytes().to_vec();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["guard::watchdog::tests::rank_1_as_a_process", "--exact"])
            .arg("--ignored")
            .env(INVITATION, serde_json::to_string(&bytes).unwrap())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let joined = &run.records[0].stop;
        eventually("the process joins", || joined.load(Ordering::Relaxed));
        let kill = format!("kill -{signal} {}", child.id());
        let killed = Command::new("sh").args(["-c", &kill]).status().unwrap();
        assert!(killed.success());
        let line = run.records[0].exit_reason();
        child.kill().unwrap();
        child.wait().unwrap();
        let person = format!(", pid {}): {words}", child.id());
        assert!(line.starts_with("watchdog: lost rank 1 ("), "{line}");
        assert!(line.contains(&person), "{line}");
    }
}

fn alone(settings: &Settings) -> (Record, Watchdog) {
    let record = Record::default();
    let watchdog = Watchdog::alone(settings, record.hooks(), record.stop.clone()).unwrap();
    (record, watchdog)
}

#[test]
fn a_world_of_one_stops_and_saves_alike() {
    let mut settings = settings();
    settings.stop_grace = Duration::from_millis(50);
    let (record, watchdog) = alone(&settings);
    watchdog.pulse().begin(9).unwrap();
    watchdog.pulse().phase(Phase::Forward);
    record.stop.store(true, Ordering::Relaxed);
    assert_eq!(watchdog.pulse().wait_for_abandon(PATIENCE), Some(9));
    assert_eq!(watchdog.pulse().submit_control(10), Err(Abandoned));
    watchdog.saved(9);
    assert!(watchdog.wait_for_parts(PATIENCE));
    watchdog.committed(Ok(()));
    assert!(watchdog.wait_for_leave(PATIENCE).unwrap().complete);
    watchdog.leave();
    assert_eq!(record.exits(), Vec::<String>::new());
}

#[test]
fn a_world_of_one_that_hangs_shows_its_stacks_and_exits() {
    let mut settings = settings();
    settings.hang_timeout = Duration::from_millis(300);
    let (record, watchdog) = alone(&settings);
    watchdog.pulse().step(3);
    watchdog.pulse().phase(Phase::Update);
    let line = record.exit_reason();
    assert!(line.starts_with("watchdog: lost rank 0 ("), "{line}");
    assert!(line.contains("in update of step 3"), "{line}");
    assert_eq!(record.dumps.load(Ordering::Relaxed), 1);
    drop(watchdog);
}
