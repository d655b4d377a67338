//! What travels between a rank and rank 0: frames of a length and a JSON object.
//!
//! Lengths are bounded before anything is allocated, and a frame that is no message closes its
//! connection.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::gate::Mark;
use super::pulse::PulseState;

/// Bytes that a frame may have. The largest message is a state with the times of some steps.
const MAX_FRAME: usize = 16 * 1024;

/// Characters of a text that are sent, so that no message comes near [`MAX_FRAME`].
const MAX_TEXT: usize = 1000;

/// From a rank to rank 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum FromRank {
    /// The first message.
    Here { host: String, pid: u32 },
    /// The sign of life.
    State(PulseState),
    /// Somebody asks the run to stop.
    Stop { reason: String },
    /// The gate is closed.
    Frozen { mark: Mark },
    /// The own part of the state after `step` is saved, or why not.
    Saved { step: u64, error: Option<String> },
    /// Rank 0 has committed the parts, or why not.
    Committed { error: Option<String> },
    /// The stacks are written down.
    Dumped,
    /// The connection will close, and that is right.
    Goodbye,
}

/// From rank 0 to a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ToRank {
    /// The answer to a sign of life.
    Heard,
    /// The run is to stop.
    Stop { reason: String },
    /// Close the gate and say what it has let through.
    Freeze,
    /// Leave the step under way and save the state after this one.
    Abandon { mark: Mark },
    /// All parts are saved.
    Parts { step: u64 },
    /// Exit now.
    Leave { complete: bool, detail: String },
    /// The run is lost; write down the stacks if asked to, and wait for [`ToRank::Exit`].
    End { line: String, dump: bool },
    /// Call the exit hook.
    Exit,
    /// The answer to a goodbye.
    Farewell,
    /// Rank 0 goes, and that is right.
    Closing,
}

/// `text`, short enough to send.
pub(super) fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// A message as it travels; nothing for one that cannot be written.
pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    let Ok(body) = serde_json::to_vec(message) else {
        return Vec::new();
    };
    let Ok(length) = u32::try_from(body.len()) else {
        return Vec::new();
    };
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend(body);
    frame
}

/// Bytes as they come, until they make messages.
#[derive(Debug, Default)]
pub(super) struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// What is wrong with it; the stream cannot be read on.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, String> {
        let Some(length) = self.bytes.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(format!("a frame of {length} bytes, more than {MAX_FRAME}"));
        }
        let Some(body) = self.bytes.get(4..4 + length) else {
            return Ok(None);
        };
        let message = serde_json::from_slice(body).map_err(|error| error.to_string());
        self.bytes.drain(..4 + length);
        message.map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_arrives_in_pieces() {
        let sent = FromRank::Stop {
            reason: "time".into(),
        };
        let bytes = [encode(&sent), encode(&FromRank::Goodbye)].concat();
        let mut frames = Frames::default();
        let mut got = Vec::new();
        for byte in bytes {
            frames.push(&[byte]);
            got.extend(frames.next::<FromRank>().unwrap());
        }
        assert_eq!(got, [sent, FromRank::Goodbye]);
    }

    #[test]
    fn the_largest_state_fits() {
        let state = PulseState {
            busy: vec![(u64::MAX, 1.0 / 3.0); super::super::pulse::KEPT_TIMES],
            waits_for: Some(short(&"\u{1}".repeat(5000))),
            ..PulseState::default()
        };
        let mut frames = Frames::default();
        let sent = FromRank::State(state);
        frames.push(&encode(&sent));
        assert_eq!(frames.next::<FromRank>().unwrap(), Some(sent));
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_arrives() {
        let mut frames = Frames::default();
        frames.push(&u32::MAX.to_le_bytes());
        assert!(frames.next::<FromRank>().unwrap_err().contains("more than"));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Frames::default();
            frames.push(&bytes);
            let short = u32::try_from(bytes.len()).unwrap().to_le_bytes();
            while let Ok(Some(_)) = frames.next::<FromRank>() {}
            // The same as the body of a frame of the right length.
            let mut frames = Frames::default();
            frames.push(&short);
            frames.push(&bytes);
            prop_assert!(frames.next::<FromRank>().is_err());
        }
    }
}
