//! How a run is watched from outside the step loop: its watchdog, and where the loop says how far
//! it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::{RunError, abandon::SAVING, ranks::Ranks};
use crate::comm::{Comm, Monitor};
use crate::config::Config;
use crate::guard::watchdog::{ExitHook, Hooks, Host, Invitation, Phase, Pulse, Settings, Watchdog};
use crate::plan::Action;

/// The watchdog of a rank, and the rank's position as it sees it.
#[derive(Debug)]
pub struct Watch {
    watchdog: Watchdog,
    position: Arc<AtomicU64>,
    monitor: Monitor,
    began: Instant,
}

impl Watch {
    /// Sets up the watchdog of all ranks of `comm`: rank 0 invites the others. Every rank calls it
    /// before [`train`](super::train), and [`Watch::leave`] when it has left the others.
    ///
    /// `exit` ends the process when the run is lost; `stop` becomes true when any rank is asked to
    /// stop, and asks all when it becomes true here.
    ///
    /// # Errors
    /// [`RunError::Watchdog`] when ranks cannot reach rank 0.
    pub fn new(
        config: &Config,
        comm: &Comm,
        exit: ExitHook,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, RunError> {
        let began = Instant::now();
        let settings = settings(config);
        let position = Arc::new(AtomicU64::new(0));
        let (monitor, at) = (comm.monitor(), Arc::clone(&position));
        let (waiting, own) = (comm.monitor(), comm.monitor());
        let hooks = Hooks {
            // In the step that is kept all ranks go on to its end, and so do its collectives.
            on_abandon: Arc::new(move |kept| {
                if at.load(Ordering::SeqCst) > kept {
                    monitor.interrupt();
                }
            }),
            waits_for: Arc::new(move || waiting.waiting()),
            ..Hooks::new(Arc::clone(&exit))
        };
        let watchdog = if comm.world() == 1 {
            Watchdog::alone(&settings, hooks, stop)?
        } else {
            let ranks = Ranks::new(comm)?;
            let one_host = comm.local_world() == comm.world();
            let host = if ranks.leads() {
                Host::open(comm.world(), one_host, &settings, exit).map(Some)
            } else {
                Ok(None)
            };
            let host = ranks.together(host.map_err(RunError::from))?;
            let invitation = host.as_ref().map(|host| host.invitation().to_bytes());
            let bytes = ranks.leaders_bytes(invitation.unwrap_or([0; Invitation::BYTES]))?;
            let join = || {
                let invitation = Invitation::from_bytes(&bytes)?;
                let (rank, world) = (ranks.rank, ranks.ranks);
                Watchdog::join(&invitation, host, rank, world, &settings, hooks, stop)
            };
            ranks.together(join().map_err(RunError::from))?
        };
        Ok(Self {
            watchdog,
            position,
            monitor: own,
            began,
        })
    }

    /// Says goodbye: that this rank ends is no death.
    pub fn leave(self) {
        self.watchdog.leave();
    }

    /// When this rank started.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Tells the others that this rank has no state to save.
    pub(super) fn cannot_save(&self, reason: &str) {
        if let Some(step) = self.pulse().abandoned() {
            self.watchdog.save_failed(step, reason);
        }
    }

    pub(super) fn dog(&self) -> &Watchdog {
        &self.watchdog
    }

    fn pulse(&self) -> &Pulse {
        self.watchdog.pulse()
    }

    /// The state after `step` is here: at the start, and after going back.
    pub(super) fn begin(&self, step: u64) -> Result<(), RunError> {
        self.pulse().begin(step)?;
        self.enter(step + 1);
        Ok(())
    }

    /// Everything from here on belongs to step `step`.
    pub(super) fn enter(&self, step: u64) {
        self.position.store(step, Ordering::SeqCst);
        self.pulse().step(step);
        // The step before was kept and is complete; what is between the two (a check, a save) the
        // others will not take part in any more. Either this or `on_abandon` sees both.
        if self.gives_up(step) {
            self.monitor.interrupt();
        }
    }

    /// Whether step `step`, which is under way, is given up: look at it while waiting.
    pub(super) fn gives_up(&self, step: u64) -> bool {
        self.pulse().must_abandon(step)
    }

    /// Something else begins, and everything goes well so far.
    pub(super) fn phase(&self, phase: Phase) {
        self.pulse().phase(phase);
    }

    /// An action is about to be done in step `step`.
    ///
    /// # Errors
    /// [`RunError::Abandoned`] when the step is given up.
    pub(super) fn act(&self, step: u64, action: Action) -> Result<(), RunError> {
        let pulse = self.pulse();
        if self.gives_up(step) {
            return Err(RunError::Abandoned);
        }
        match action {
            Action::Forward { .. } => pulse.phase(Phase::Forward),
            Action::Backward { .. } => pulse.phase(Phase::Backward),
            Action::Update { .. } => pulse.phase(Phase::Update),
            Action::Control => {
                pulse.phase(Phase::Control);
                pulse.submit_control(step)?;
            }
            Action::Evaluate { .. }
            | Action::Recompute { .. }
            | Action::Exchange(_)
            | Action::Norm { .. } => {}
        }
        pulse.progress();
        Ok(())
    }

    /// A step is done, in which this rank was busy for so long without waiting for others.
    pub(super) fn done(&self, busy_seconds: f64) {
        self.pulse().busy_seconds(busy_seconds);
    }

    /// Whether the step under way is being given up.
    pub(super) fn abandoning(&self) -> bool {
        self.pulse().abandoned().is_some()
    }
}

fn settings(config: &Config) -> Settings {
    let guard = &config.guard;
    Settings {
        lease: guard.lease.duration(),
        hang_timeout: guard.hang_timeout.duration(),
        start_timeout: guard.start_timeout.duration(),
        stop_grace: guard.stop_grace.duration(),
        interface: guard.watch_interface.clone(),
        save_timeout: SAVING,
        ..Settings::default()
    }
}
