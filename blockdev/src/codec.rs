//! Little-endian fields in a fixed buffer, in order: no offset is ever written by hand.

/// Writes fields one after another; what is not written stays as it was.
pub(crate) struct Encoder<'a> {
    buf: &'a mut [u8],
    at: usize,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(buf: &'a mut [u8]) -> Self {
        Encoder { buf, at: 0 }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.buf[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}

/// Reads fields one after another. Beyond the end it reads zeros and remembers that it did, so a
/// decoder checks once.
pub(crate) struct Decoder<'a> {
    buf: &'a [u8],
    overrun: bool,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(buf: &'a [u8]) -> Self {
        Decoder {
            buf,
            overrun: false,
        }
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        match self.buf.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.buf = rest;
                *field
            }
            None => {
                self.overrun = true;
                self.buf = &[];
                [0; N]
            }
        }
    }

    pub(crate) fn u8(&mut self) -> u8 {
        let [value] = self.bytes();
        value
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// Whether every field was there and everything after the last one is zero.
    pub(crate) fn ends_in_zeros(&self) -> bool {
        !self.overrun && self.buf.iter().all(|&byte| byte == 0)
    }
}

/// CRC32C of `buf` with the four bytes at `at` taken as zero.
pub(crate) fn crc_without(buf: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&buf[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &buf[at + 4..])
}

/// A UUID in the usual notation.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
