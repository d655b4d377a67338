//! The state of a run from a checkpoint: when it starts, and when it goes back.

use std::ops::Range;
use std::path::Path;

use super::{RunError, progress::Progress, ranks::Ranks, trainer::Trainer};
use crate::checkpoint::{self, Checkpoint, StateKind};
use crate::metrics::Event;
use crate::plan::Action;
use crate::zero::{InitialValues, Zero, ZeroError};

/// All state that a run reads from its checkpoint.
const STATES: [StateKind; 3] = [StateKind::Master, StateKind::ExpAvg, StateKind::ExpAvgSq];

/// Reads this rank's elements of all state, and with `verify` on the leader what nobody else reads:
/// together the ranks have then compared every byte of the checkpoint with its checksum. Returns
/// what is wrong with it on any rank; the state is unspecified then. `alive`
/// is called again and again.
///
/// # Errors
/// What has nothing to do with the checkpoint.
pub(super) fn read_state(
    zero: &mut Zero,
    checkpoint: &Checkpoint,
    ranks: &Ranks,
    verify: bool,
    alive: impl Fn(),
) -> Result<Option<String>, RunError> {
    let read = zero.load(|spec, state, range, out| {
        alive();
        checkpoint.read(&spec.name, state, range, out)
    });
    let rest = match &read {
        Ok(()) if verify && ranks.leads() => checkpoint.verify_rest(&STATES, &mut |_, _| alive()),
        _ => Ok(()),
    };
    let damage = match (read, rest) {
        (Err(ZeroError::Read { tensor, problem }), _) => {
            Some(format!("tensor {tensor}: {problem}"))
        }
        (Err(other), _) => return ranks.together(Err(other.into())),
        (Ok(()), Err(damage)) => Some(damage.to_string()),
        (Ok(()), Ok(())) => None,
    };
    if let Some(reason) = &damage {
        let dir = checkpoint.dir().display();
        tracing::error!("{dir} is damaged and cannot be used: {reason}");
    }
    ranks.together(Ok(()))?;
    let sound = ranks.all(damage.is_none())?;
    let elsewhere = || "another rank found it damaged, see its log".to_owned();
    Ok((!sound).then(|| damage.unwrap_or_else(elsewhere)))
}

/// Takes a checkpoint that a rank has found damaged out of the run, on the leader: it would look
/// newer than those that the run goes on to write.
pub(super) fn set_aside(ranks: &Ranks, dir: &Path) -> Result<(), RunError> {
    let moved = if ranks.leads() {
        checkpoint::set_aside(dir).map(|aside| {
            tracing::error!(
                "the damaged checkpoint lies in {} now; the run goes on from an older one",
                aside.display()
            );
        })
    } else {
        Ok(())
    };
    ranks.together(moved.map_err(RunError::from))
}

/// Fills weights from the seed.
pub(super) fn initial_values(zero: &mut Zero, seed: u64) -> Result<(), RunError> {
    let values = InitialValues { seed };
    zero.load(|spec, state, range, out| {
        values.read(spec, state, range, out);
        Ok::<_, std::convert::Infallible>(())
    })?;
    Ok(())
}

/// Loads weights alone; the moments start at zero.
pub(super) fn weights_alone<E: std::fmt::Display>(
    zero: &mut Zero,
    read: impl Fn(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
) -> Result<(), RunError> {
    zero.load(|spec, state, range, out| match state {
        StateKind::Master => read(&spec.name, range, out),
        StateKind::ExpAvg | StateKind::ExpAvgSq => {
            out.fill(0.0);
            Ok(())
        }
    })?;
    Ok(())
}

impl Trainer<'_> {
    /// Takes over everything that a checkpoint says beside its tensors.
    pub(super) fn take_over(&mut self, checkpoint: &Checkpoint) -> Result<(), RunError> {
        let meta = checkpoint.meta();
        let steps: Vec<u64> = self.config.stages.iter().map(|stage| stage.steps).collect();
        self.progress = Progress::from_manifest(meta, checkpoint.dir())?.fitted(&steps);
        self.control.set_adam_steps(self.progress.adam_step)?;
        self.spikes.restore(meta.guard.spikes.clone());
        self.parent = Some(self.shown(checkpoint.dir()));
        Ok(())
    }

    /// Goes on with data that are not those of the checkpoint, if there are `differences`.
    pub(super) fn take_changed_data(&mut self, differences: Vec<String>) {
        if differences.is_empty() {
            return;
        }
        let (cursor, moved) = self.progress.cursor.fitted(&self.dataset);
        self.progress.cursor = cursor;
        let lines = differences.into_iter().chain(moved);
        let difference = lines.collect::<Vec<_>>().join("\n");
        tracing::warn!(
            "going on with changed data: documents may come again or be left out\n{difference}"
        );
        self.event(Event::DataChanged {
            step: self.progress.step,
            difference,
        });
    }

    /// Brings under way what the plan's lists expect to be under way when they begin.
    pub(super) fn open_exchanges(&mut self) -> Result<(), RunError> {
        for action in self.plan.opening() {
            if let Action::Exchange(exchange) = action {
                self.zero.exchange(exchange)?;
            }
        }
        Ok(())
    }

    /// Writes down that a checkpoint was passed over.
    pub(super) fn reject(&mut self, step: u64, reason: String) {
        self.event(Event::CheckpointRejected { step, reason });
    }
}
