//! Readahead: which pages to read before they are asked for.
//!
//! An open file has a few streams, each a place where sequential reading goes on. A second access
//! in sequence opens a window, further ones double it up to the maximum; when less than half a
//! window lies ahead of the reader, the next one is read, so that the devices work while he uses
//! the last. Accesses may overtake each other a little, as several threads read for the kernel.

use parking_lot::Mutex;

use crate::PageRange;

/// Streams of one open file.
const STREAMS: usize = 4;
/// First window: 128 KiB.
const WINDOW_MIN: u64 = 32;
/// An access this far behind the stream's place still belongs to it: 1 MiB.
const BEHIND_MAX: u64 = 256;
/// Windows end at multiples of this once they are as long, so that folios can be large.
const ALIGN: u64 = 256;

#[derive(Clone, Copy, Default)]
struct Stream {
    /// Where reading goes on.
    next: u64,
    /// What is below has been read or asked for.
    ahead: u64,
    window: u64,
    used_at: u64,
}

/// What readahead remembers of one open file.
#[derive(Default)]
pub struct ReadaheadState {
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
    eof_page: u64,
}

impl ReadaheadState {
    /// Of a file just opened.
    pub fn new() -> Self {
        Self::default()
    }

    /// The pages were accessed; gives what to read ahead now. `eof_bytes` if the caller knows it.
    pub(crate) fn access(
        &self,
        pages: PageRange,
        eof_bytes: Option<u64>,
        pages_max: u64,
    ) -> Option<PageRange> {
        let mut streams = self.streams.lock();
        if let Some(bytes) = eof_bytes {
            streams.eof_page = bytes.div_ceil(crate::units::PAGE);
        }
        streams.access(pages, pages_max)
    }
}

impl Streams {
    fn access(&mut self, pages: PageRange, pages_max: u64) -> Option<PageRange> {
        if pages_max == 0 {
            return None;
        }
        self.clock += 1;
        let clock = self.clock;
        let belongs = |stream: &&mut Stream| {
            stream.used_at > 0
                && pages.start + BEHIND_MAX >= stream.next
                && pages.start <= stream.next.max(stream.ahead)
        };
        let window_first = (2 * pages.count().next_power_of_two()).clamp(WINDOW_MIN, pages_max);
        let Some(stream) = self.streams.iter_mut().find(belongs) else {
            let oldest = self
                .streams
                .iter_mut()
                .min_by_key(|stream| stream.used_at)?;
            let (next, ahead) = (pages.end, pages.end);
            *oldest = Stream {
                next,
                ahead,
                window: 0,
                used_at: clock,
            };
            // Reading from the start is most likely the start of reading.
            if pages.start > 0 {
                return None;
            }
            oldest.window = window_first;
            return oldest.issue(self.eof_page, pages_max);
        };
        stream.used_at = clock;
        if pages.end <= stream.next {
            return None;
        }
        stream.next = pages.end;
        if stream.window == 0 {
            stream.window = window_first;
        } else if stream.next + stream.window / 2 < stream.ahead {
            return None;
        } else {
            stream.window = (stream.window * 2).min(pages_max);
        }
        stream.issue(self.eof_page, pages_max)
    }
}

impl Stream {
    fn issue(&mut self, eof_page: u64, pages_max: u64) -> Option<PageRange> {
        let start = self.ahead.max(self.next);
        let mut end = self.next + self.window;
        if self.window >= ALIGN && pages_max >= ALIGN {
            end = end.next_multiple_of(ALIGN);
        }
        let range = PageRange::new(start, end.min(eof_page))?;
        self.ahead = range.end;
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOF: u64 = 1 << 40;

    fn read(state: &ReadaheadState, start: u64, count: u64) -> Option<PageRange> {
        state.access(
            PageRange {
                start,
                end: start + count,
            },
            Some(EOF),
            1024,
        )
    }

    #[test]
    fn windows_grow_and_tile_the_file() {
        let state = ReadaheadState::new();
        let mut ahead = 0;
        let mut largest = 0;
        for step in 0..1000 {
            if let Some(range) = read(&state, step * 32, 32) {
                assert!(
                    range.start == ahead.max((step + 1) * 32),
                    "{range:?} after {ahead}"
                );
                ahead = range.end;
                largest = largest.max(range.count());
            }
            assert!(
                ahead >= (step + 1) * 32,
                "the reader is never ahead of readahead"
            );
        }
        assert!(largest >= 512, "{largest}");
    }

    #[test]
    fn random_reads_read_nothing_ahead() {
        let state = ReadaheadState::new();
        for step in 1..1000u64 {
            assert_eq!(read(&state, step * 7919 % 100_003 * 1000 + 1000, 1), None);
        }
    }

    #[test]
    fn several_streams_are_kept_apart() {
        let state = ReadaheadState::new();
        let mut issued = [0u64; 3];
        for step in 0..200 {
            for stream in 0..3u64 {
                let base = (stream + 1) << 24;
                if let Some(range) = read(&state, base + step * 8, 8) {
                    assert!(range.start >= base && range.end < base + (1 << 20));
                    issued[usize::try_from(stream).unwrap()] += range.count();
                }
            }
        }
        assert!(issued.iter().all(|&pages| pages >= 1600 - 8), "{issued:?}");
    }

    #[test]
    fn stays_below_the_end_and_tolerates_overtaking() {
        let state = ReadaheadState::new();
        let eof = Some(100 * 4096 - 5);
        let ahead = state
            .access(PageRange { start: 0, end: 32 }, eof, 1024)
            .unwrap();
        assert_eq!(ahead, PageRange { start: 32, end: 96 });
        let ahead = state.access(PageRange { start: 64, end: 96 }, eof, 1024);
        assert_eq!(ahead, PageRange::new(96, 100));
        assert_eq!(
            state.access(PageRange { start: 32, end: 64 }, eof, 1024),
            None
        );
        assert_eq!(
            state.access(
                PageRange {
                    start: 96,
                    end: 100
                },
                eof,
                1024
            ),
            None
        );
    }
}
