//! How both ends of a connection prove that they belong to the run.
//!
//! ```text
//! rank 0 ─▶ rank     nonce of rank 0                                                  32 bytes
//! rank   ─▶ rank 0   magic, rank, world, own nonce, proof over all of these          104 bytes
//! rank 0 ─▶ rank     proof over the same with another label                           32 bytes
//! ```
//!
//! A proof is an HMAC-SHA256 under the secret of the run, which itself never travels on the
//! connection. The labels differ, so that a proof cannot be sent back to whom it came from, and the
//! nonces are fresh, so that it cannot be used again. Before it is verified, rank 0 reads these 104
//! bytes and no more.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::error::WatchdogError;

/// What opens the answer of a rank.
const MAGIC: [u8; 4] = *b"oxw1";

/// Bytes of secrets, nonces and proofs.
pub(super) const BYTES: usize = 32;

/// Bytes of the answer of a rank.
pub(super) const ANSWER_BYTES: usize = 4 + 4 + 4 + BYTES + BYTES;

/// The secret of a run. It has no `Debug`, so that it can get into no log.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(pub(super) [u8; BYTES]);

/// Random bytes from the system.
pub(super) fn random() -> Result<[u8; BYTES], WatchdogError> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(|error| WatchdogError::System {
        what: "random bytes",
        reason: error.to_string(),
    })?;
    Ok(bytes)
}

/// What both ends prove to have seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transcript {
    pub(super) server_nonce: [u8; BYTES],
    pub(super) client_nonce: [u8; BYTES],
    pub(super) rank: u32,
    pub(super) world: u32,
}

impl Transcript {
    /// The answer of a rank to the nonce of rank 0.
    pub(super) fn answer(&self, secret: &Secret) -> Vec<u8> {
        let mut answer = Vec::with_capacity(ANSWER_BYTES);
        answer.extend(MAGIC);
        answer.extend(self.rank.to_le_bytes());
        answer.extend(self.world.to_le_bytes());
        answer.extend(self.client_nonce);
        answer.extend(self.proof(secret, b"oxitron watchdog: rank"));
        answer
    }

    /// Reads and verifies the answer of a rank; what is wrong with it otherwise.
    pub(super) fn verify_answer(
        secret: &Secret,
        server_nonce: [u8; BYTES],
        answer: &[u8; ANSWER_BYTES],
    ) -> Result<Self, &'static str> {
        let (magic, rest) = answer.split_at(4);
        let (rank, rest) = rest.split_at(4);
        let (world, rest) = rest.split_at(4);
        let (nonce, proof) = rest.split_at(BYTES);
        if magic != MAGIC {
            return Err("not a rank of this program");
        }
        let transcript = Self {
            server_nonce,
            client_nonce: array(nonce),
            rank: u32::from_le_bytes(array(rank)),
            world: u32::from_le_bytes(array(world)),
        };
        if transcript.verify(secret, b"oxitron watchdog: rank", proof) {
            Ok(transcript)
        } else {
            Err("it does not know the secret of this run")
        }
    }

    /// What rank 0 answers to a rank that has proven itself.
    pub(super) fn confirmation(&self, secret: &Secret) -> [u8; BYTES] {
        self.proof(secret, b"oxitron watchdog: rank 0")
    }

    /// Whether whoever sent this is rank 0 of the run.
    pub(super) fn verify_confirmation(&self, secret: &Secret, proof: &[u8]) -> bool {
        self.verify(secret, b"oxitron watchdog: rank 0", proof)
    }

    fn proof(&self, secret: &Secret, label: &[u8]) -> [u8; BYTES] {
        self.keyed(secret, label)
            .map(|mac| mac.finalize().into_bytes().into())
            .unwrap_or_default()
    }

    /// In constant time.
    fn verify(&self, secret: &Secret, label: &[u8], proof: &[u8]) -> bool {
        self.keyed(secret, label)
            .is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }

    /// Always there: HMAC takes keys of any length.
    fn keyed(&self, secret: &Secret, label: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).ok()?;
        mac.update(&(label.len() as u64).to_le_bytes());
        mac.update(label);
        mac.update(&self.server_nonce);
        mac.update(&self.client_nonce);
        mac.update(&self.rank.to_le_bytes());
        mac.update(&self.world.to_le_bytes());
        Some(mac)
    }
}

/// The first `N` bytes, zeros where there are fewer.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk::<N>().copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn transcript() -> Transcript {
        Transcript {
            server_nonce: random().unwrap(),
            client_nonce: random().unwrap(),
            rank: 3,
            world: 8,
        }
    }

    #[test]
    fn both_ends_recognise_each_other() {
        let secret = Secret(random().unwrap());
        let mine = transcript();
        let answer: [u8; ANSWER_BYTES] = mine.answer(&secret).try_into().unwrap();
        let seen = Transcript::verify_answer(&secret, mine.server_nonce, &answer).unwrap();
        assert_eq!((seen.rank, seen.world), (3, 8));
        assert!(mine.verify_confirmation(&secret, &seen.confirmation(&secret)));
        let text = answer.windows(BYTES).any(|window| window == secret.0);
        assert!(!text, "the secret travels");
    }

    #[test]
    fn any_changed_bit_of_an_answer_is_refused() {
        let secret = Secret(random().unwrap());
        let mine = transcript();
        let answer: [u8; ANSWER_BYTES] = mine.answer(&secret).try_into().unwrap();
        for bit in 0..ANSWER_BYTES * 8 {
            let mut changed = answer;
            changed[bit / 8] ^= 1 << (bit % 8);
            let seen = Transcript::verify_answer(&secret, mine.server_nonce, &changed);
            assert!(seen.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_wrong_secret_an_old_nonce_and_an_echo_are_refused() {
        let secret = Secret(random().unwrap());
        let other = Secret(random().unwrap());
        let mine = transcript();
        let answer: [u8; ANSWER_BYTES] = mine.answer(&secret).try_into().unwrap();
        assert!(Transcript::verify_answer(&other, mine.server_nonce, &answer).is_err());
        assert!(Transcript::verify_answer(&secret, random().unwrap(), &answer).is_err());
        assert!(!mine.verify_confirmation(&secret, &mine.confirmation(&other)));
        assert!(!mine.verify_confirmation(&secret, &answer[ANSWER_BYTES - BYTES..]));
        assert!(!mine.verify_confirmation(&secret, &[]));
    }
}
