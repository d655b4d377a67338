//! TensorBoard event files, written by hand.
//!
//! The format is two frozen layers. Outside, TFRecord framing: the length of the payload as a
//! little-endian `u64`, the masked CRC32C of those eight bytes, the payload, the masked CRC32C of
//! the payload. Inside, a protobuf `Event` (`tensorboard/compat/proto/event.proto`), of which four
//! fields are used: `wall_time = 1` (double), `step = 2` (int64), `file_version = 3` (string, the
//! first record of a file), `summary = 5` and `session_log = 7`. A `Summary` is a list of
//! `Value { tag = 1, simple_value = 2 }`. That is little enough to encode here, and a crate for it
//! would bring a protobuf runtime.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::MetricsError;

/// One event file, open for appending.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a file for this attempt inside `folder`.
    ///
    /// TensorBoard reads the files of a folder in the order of their names, so the name begins
    /// with the time; process id and attempt keep two files of one second apart.
    pub(super) fn create(folder: &Path, attempt: u32) -> Result<Self, MetricsError> {
        let now = unix_seconds();
        let name = format!(
            "events.out.tfevents.{:010}.{}.{attempt:04}",
            now as u64,
            std::process::id()
        );
        let path = folder.join(name);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(MetricsError::io(&path, "create"))?;
        let mut events = Self { path, file };
        let mut event = event_header(now, 0);
        put_bytes(&mut event, 3, b"brain.Event:2");
        events.write(&event)?;
        Ok(events)
    }

    /// Appends scalars that belong to one step.
    pub(super) fn scalars(
        &mut self,
        wall_time: f64,
        step: u64,
        scalars: &[(&str, f64)],
    ) -> Result<(), MetricsError> {
        self.write(&scalar_event(wall_time, step, scalars))
    }

    /// Tells readers that whatever earlier files say of `first_step` and later is void.
    pub(super) fn session_start(
        &mut self,
        wall_time: f64,
        first_step: u64,
    ) -> Result<(), MetricsError> {
        let mut event = event_header(wall_time, first_step);
        // SessionLog { status = 1: START = 1 }
        put_bytes(&mut event, 7, &[1 << 3, 1]);
        self.write(&event)
    }

    /// Waits until the events are on disk.
    pub(super) fn sync(&self) -> Result<(), MetricsError> {
        self.file
            .sync_data()
            .map_err(MetricsError::io(&self.path, "flush to disk"))
    }

    fn write(&mut self, event: &[u8]) -> Result<(), MetricsError> {
        // One `write` per record: a reader that follows the file sees whole records.
        self.file
            .write_all(&framed(event))
            .map_err(MetricsError::io(&self.path, "append"))
    }
}

/// Seconds since 1970-01-01 UTC by the machine's clock.
pub(super) fn unix_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// A payload as a TFRecord.
fn framed(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc(payload).to_le_bytes());
    record
}

/// CRC32C, rotated and offset: the format does so because a checksum of data that itself contains
/// checksums is weak.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn scalar_event(wall_time: f64, step: u64, scalars: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, number) in scalars {
        let mut value = Vec::with_capacity(tag.len() + 8);
        put_bytes(&mut value, 1, tag.as_bytes());
        put_key(&mut value, 2, FIXED32);
        value.extend_from_slice(&(*number as f32).to_le_bytes());
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = event_header(wall_time, step);
    put_bytes(&mut event, 5, &summary);
    event
}

/// The fields that every event begins with. Like any proto3 encoder, step 0 is left out.
fn event_header(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::with_capacity(64);
    put_key(&mut event, 1, FIXED64);
    event.extend_from_slice(&wall_time.to_le_bytes());
    if step > 0 {
        put_key(&mut event, 2, VARINT);
        put_varint(&mut event, step);
    }
    event
}

// Protobuf wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

fn put_key(message: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(message, field << 3 | wire_type);
}

fn put_bytes(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(message, field, BYTES);
    put_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

fn put_varint(message: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        message.push(number as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn crc32c_is_the_castagnoli_polynomial() {
        // RFC 3720, appendix B.4, and the customary check value.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn framing_equals_tensorboards_record_writer() {
        // RecordWriter of tensorboard 2.21 on the same seven bytes.
        assert_eq!(
            hex(&framed(b"oxitron")),
            "0700000000000000bbd79f116f786974726f6e13fbcc65"
        );
    }

    #[test]
    fn events_equal_the_encoding_of_the_protobuf_library() {
        // `SerializeToString` of tensorboard 2.21's event_pb2.
        assert_eq!(
            hex(&scalar_event(1.5, 300, &[("train/loss", 2.5)])),
            "09000000000000f83f10ac022a130a110a0a747261696e2f6c6f73731500002040"
        );
        let mut version = event_header(1.5, 0);
        put_bytes(&mut version, 3, b"brain.Event:2");
        assert_eq!(
            hex(&version),
            "09000000000000f83f1a0d627261696e2e4576656e743a32"
        );
    }

    #[test]
    fn varints_carry_seven_bits_a_byte() {
        for (number, encoded) in [
            (0, "00"),
            (127, "7f"),
            (128, "8001"),
            (300, "ac02"),
            (u64::MAX, "ffffffffffffffffff01"),
        ] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, number);
            assert_eq!(hex(&bytes), encoded);
        }
    }

    #[test]
    fn a_file_is_a_version_record_and_then_events() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 3).unwrap();
        file.session_start(1.5, 7).unwrap();
        let bytes = std::fs::read(&file.path).unwrap();
        let version = 24;
        assert_eq!(bytes[..8], (version as u64).to_le_bytes());
        // `SerializeToString` of a SessionLog START event at step 7.
        let start = &bytes[12 + version + 4..];
        assert_eq!(
            hex(&start[12..start.len() - 4]),
            "09000000000000f83f10073a020801"
        );
    }
}
