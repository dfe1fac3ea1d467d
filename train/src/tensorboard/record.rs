//! TFRecord, the framing of event files: length (u64), its checksum, data, their checksum; little-endian. Checksums are CRC-32C, masked as
//! `((crc >> 15) | (crc << 17)) + 0xa282ead8` (tensorflow/core/lib/hash/crc32c.h).

use std::io::{self, ErrorKind, Read};

/// CRC-32C's polynomial (Castagnoli), bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Longer than any record that is written: a length above it is damage.
const LONGEST: u64 = 1 << 28;

/// For each byte, what it does to the checksum with 0 to 7 bytes after it.
static TABLE: [[u32; 256]; 8] = {
    let mut t = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let (mut c, mut bit) = (i as u32, 0);
        while bit < 8 {
            c = if c & 1 == 1 { (c >> 1) ^ POLYNOMIAL } else { c >> 1 };
            bit += 1;
        }
        t[0][i] = c;
        i += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut i = 0;
        while i < 256 {
            t[k][i] = (t[k - 1][i] >> 8) ^ t[0][(t[k - 1][i] & 0xff) as usize];
            i += 1;
        }
        k += 1;
    }
    t
};

/// CRC-32C, eight bytes at a time.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    let (eights, rest) = bytes.as_chunks::<8>();
    let mut crc = !0u32;
    for b in eights {
        let low = crc.to_le_bytes();
        crc = (0..8).fold(0, |c, i| c ^ TABLE[7 - i][usize::from(if i < 4 { b[i] ^ low[i] } else { b[i] })]);
    }
    !rest.iter().fold(crc, |c, b| (c >> 8) ^ TABLE[0][((c ^ u32::from(*b)) & 0xff) as usize])
}

pub(super) fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Appends `data` as a record.
pub(super) fn append(out: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
}

/// The next record's data; none at the end, and where one is cut off or damaged, behind which nothing can be found.
pub(super) fn next(input: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut head = [0; 12];
    if !filled(input, &mut head)? {
        return Ok(None);
    }
    let (length, sum) = head.split_at(8);
    let n = u64::from_le_bytes(length.try_into().unwrap_or_default());
    if masked(crc32c(length)).to_le_bytes() != sum || n > LONGEST {
        return Ok(None);
    }
    let mut data = vec![0; n as usize];
    let mut sum = [0; 4];
    let whole = filled(input, &mut data)? && filled(input, &mut sum)? && masked(crc32c(&data)).to_le_bytes() == sum;
    Ok(whole.then_some(data))
}

/// Whether there was as much to read.
fn filled(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match input.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}
