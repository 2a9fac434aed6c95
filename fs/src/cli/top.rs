//!
//! One thread asks the daemon and may wait for it; the one that draws only waits for keys, samples
//! and signals, so that it can be left whatever the daemon does. Whatever the end (a key, a signal,
//! a panic, the end of the mount), the terminal is as before.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Stdout};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::{cursor, execute, terminal};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::Paragraph;
use ratatui::{Frame, Terminal};

use super::exit::{self, CliError};
use super::rates::{self, Interval, Sample};
use super::stats;
use super::{signals, table};
use crate::meta::contain;

/// How long the screen waits for a key before it looks at the rest.
const LOOK: Duration = Duration::from_millis(50);

/// Lines of devices on a screen of 24 lines, with their head.
const DEVICE_LINES: usize = 6;

/// Lines of requests that wait, with their head.
const SLOW_LINES: u16 = 6;

/// Show what a mounted file system does now: devices, cache, requests, and what waits. Keys: q
/// quits, p pauses, s sorts, ? explains. Plain text where the output is no terminal
#[derive(clap::Args, Debug)]
pub struct TopArgs {
    /// How often it is looked at, in seconds
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = stats::interval)]
    pub interval: Duration,
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
}

pub fn run(args: &TopArgs) -> Result<(), CliError> {
    let place = Path::new(&args.mount_point);
    if !io::stdout().is_terminal() {
        return stats::follow(place, args.interval, None, false);
    }
    // What is wrong is told before the screen is taken.
    let first: Sample = stats::ask(place, "sample")?;
    // Before there are other threads, which would take the signals.
    let ended = signals::watch()?;
    let samples = watch_daemon(place, args.interval)?;
    let screen = Screen::take().map_err(|error| exit::system(format!("terminal: {error}")))?;
    let mut view = View::new(place, first);
    let end = view.follow(screen, &samples, &ended);
    end.unwrap_or_else(|error| Err(exit::system(format!("terminal: {error}"))))
}

/// Waits for a key, no longer than `time`; true if the terminal is not there any more. (crossterm
/// would go on reading from it for ever.)
fn is_gone(time: Duration) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut stdin = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut stdin, time) {
        Ok(_) => {}
        // A signal, of which the other thread tells.
        Err(Errno::EINTR) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    Ok(stdin[0].revents().is_some_and(|seen| seen.intersects(gone)))
}

/// Samples come by a channel, until one cannot be had.
fn watch_daemon(
    place: &Path,
    interval: Duration,
) -> Result<Receiver<Result<Sample, CliError>>, CliError> {
    let (to, from) = mpsc::channel();
    let place = place.to_owned();
    let ask = move || {
        let mut next = Instant::now();
        loop {
            next = (next + interval).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
            let sample = stats::ask(&place, "sample");
            let is_last = sample.is_err();
            if to.send(sample).is_err() || is_last {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("braidfs-sample".into());
    let spawned = thread.spawn(ask);
    spawned.map_err(|error| exit::system(format!("cannot start a thread: {error}")))?;
    Ok(from)
}

/// The terminal, ours until it is dropped.
struct Screen(Terminal<CrosstermBackend<Stdout>>);

impl Screen {
    fn take() -> io::Result<Self> {
        contain::watch(|info, former| {
            give_back();
            former(info);
            std::process::abort();
        });
        terminal::enable_raw_mode()?;
        // From here on whatever fails gives it back.
        let screen = Terminal::new(CrosstermBackend::new(io::stdout())).map(Self);
        let entered = execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide);
        match entered.and(screen) {
            Ok(screen) => Ok(screen),
            Err(error) => {
                give_back();
                Err(error)
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// The terminal as it was. If it has gone, nobody misses that.
fn give_back() {
    drop(execute!(
        io::stdout(),
        terminal::LeaveAlternateScreen,
        cursor::Show
    ));
    drop(terminal::disable_raw_mode());
}

/// By what devices and requests are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Rate,
    Latency,
    Name,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Rate => Self::Latency,
            Self::Latency => Self::Name,
            Self::Name => Self::Rate,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Latency => "p99",
            Self::Name => "name",
        }
    }
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Stay,
    Draw,
    Quit,
}

struct View {
    place: PathBuf,
    last: Sample,
    shown: Option<Interval>,
    paused: bool,
    help: bool,
    sort: Sort,
}

impl View {
    fn new(place: &Path, first: Sample) -> Self {
        Self {
            place: place.to_owned(),
            last: first,
            shown: None,
            paused: false,
            help: false,
            sort: Sort::Rate,
        }
    }

    /// Until there is a reason to end. The outer error is the terminal's.
    fn follow(
        &mut self,
        mut screen: Screen,
        samples: &Receiver<Result<Sample, CliError>>,
        ended: &Receiver<Signal>,
    ) -> io::Result<Result<(), CliError>> {
        screen.0.draw(|frame| self.draw(frame))?;
        loop {
            let mut step = Step::Stay;
            if is_gone(LOOK)? {
                return Ok(Err(exit::ended_by(Signal::SIGHUP)));
            }
            while event::poll(Duration::ZERO)? {
                step = step.max_with(self.take_event(&event::read()?));
            }
            match samples.try_recv() {
                Ok(Ok(sample)) => {
                    self.take_sample(sample);
                    step = step.max_with(Step::Draw);
                }
                Ok(Err(error)) => return Ok(Err(error)),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
            if let Ok(signal) = ended.try_recv() {
                return Ok(Err(exit::ended_by(signal)));
            }
            match step {
                Step::Stay => {}
                Step::Draw => {
                    screen.0.draw(|frame| self.draw(frame))?;
                }
                Step::Quit => return Ok(Ok(())),
            }
        }
    }

    fn take_sample(&mut self, sample: Sample) {
        if !self.paused {
            self.shown = Some(Interval::between(&self.last, &sample));
        }
        self.last = sample;
    }

    fn take_event(&mut self, event: &Event) -> Step {
        let key = match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => key,
            Event::Resize(..) => return Step::Draw,
            _ => return Step::Stay,
        };
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Step::Quit,
            KeyCode::Char('q') => return Step::Quit,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('?' | 'h') => self.help = !self.help,
            KeyCode::Esc if self.help => self.help = false,
            _ => return Step::Stay,
        }
        Step::Draw
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let parts: [Rect; 2] =
            Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
        let title = Style::new().add_modifier(Modifier::REVERSED);
        let width = usize::from(area.width);
        let title = Paragraph::new(format!("{:width$}", self.title())).style(title);
        frame.render_widget(title, parts[0]);
        match (&self.shown, self.help) {
            (_, true) => frame.render_widget(Paragraph::new(HELP), parts[1]),
            (None, false) => frame.render_widget(Paragraph::new("measuring..."), parts[1]),
            (Some(interval), false) => self.draw_interval(frame, parts[1], interval),
        }
    }

    /// The state first: where it is mounted may be long.
    fn title(&self) -> String {
        let interval = self.shown.as_ref();
        let seconds = interval.map_or(0.0, |interval| interval.seconds);
        let mut title = format!("braidfs  {seconds:.1} s  by {}  ? help", self.sort.name());
        if self.paused {
            title.push_str("  paused");
        }
        if interval.is_some_and(|interval| interval.frozen) {
            title.push_str("  FROZEN");
        }
        let place = self.place.to_string_lossy();
        title + "  " + &place.replace(|char: char| char.is_control(), "?")
    }

    fn draw_interval(&self, frame: &mut Frame<'_>, area: Rect, interval: &Interval) {
        let devices = self.devices(interval, usize::from(area.height) / 4);
        let slow = rates::slow_lines(&interval.slowest);
        let counted = |lines: usize| u16::try_from(lines).unwrap_or(u16::MAX);
        let slow_lines = counted(slow.len()).min(SLOW_LINES.max(area.height / 4));
        let parts: [Rect; 4] = Layout::vertical([
            Constraint::Length(4),
            Constraint::Length(counted(devices.len()) + 1),
            Constraint::Fill(1),
            Constraint::Length(slow_lines),
        ])
        .areas(area);
        let mut lines = vec![format!("fuse   {}", rates::fuse_line(&interval.fuse))];
        let cache = rates::cache_lines(&interval.cache);
        lines.extend(
            cache
                .into_iter()
                .zip(["cache  ", "       "])
                .map(|(l, head)| head.to_owned() + &l),
        );
        frame.render_widget(Paragraph::new(lines.join("\n")), parts[0]);
        frame.render_widget(Paragraph::new(columns(&devices)), parts[1]);
        let mut requests = interval.fuse.requests.clone();
        match self.sort {
            Sort::Rate => requests.sort_by(|a, b| b.per_s.total_cmp(&a.per_s)),
            Sort::Latency => requests.sort_by_key(|op| std::cmp::Reverse(op.p99_us)),
            Sort::Name => requests.sort_by(|a, b| a.op.cmp(&b.op)),
        }
        frame.render_widget(
            Paragraph::new(columns(&rates::op_lines(&requests))),
            parts[2],
        );
        frame.render_widget(Paragraph::new(columns(&slow)), parts[3]);
    }

    /// The head, and as many devices as there is room for.
    fn devices(&self, interval: &Interval, room: usize) -> Vec<Vec<String>> {
        let mut devices = interval.devices.clone();
        let bytes =
            |device: &rates::DeviceRates| device.read_bytes_per_s + device.write_bytes_per_s;
        match self.sort {
            Sort::Rate => devices.sort_by(|a, b| bytes(b).total_cmp(&bytes(a))),
            Sort::Latency => devices.sort_by_key(|d| std::cmp::Reverse(d.latency_p99_ns)),
            Sort::Name => devices.sort_by(|a, b| a.name.cmp(&b.name)),
        }
        let room = room.max(DEVICE_LINES);
        let mut lines = rates::device_lines(&devices);
        if lines.len() > room {
            let more = lines.len() - room + 1;
            lines.truncate(room - 1);
            lines.push(vec![format!("... {more} more")]);
        }
        lines
    }
}

impl Step {
    /// The one that does more.
    fn max_with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Quit, _) | (_, Self::Quit) => Self::Quit,
            (Self::Draw, _) | (_, Self::Draw) => Self::Draw,
            _ => Self::Stay,
        }
    }
}

/// Cells in columns, under a head that stands out.
fn columns(lines: &[Vec<String>]) -> Text<'static> {
    let mut text = String::new();
    table::grid(&mut text, lines);
    let head = Style::new().add_modifier(Modifier::BOLD);
    let mut lines: Vec<Line<'static>> = text
        .lines()
        // The tables of plain text are indented.
        .map(|line| Line::from(line.strip_prefix("  ").unwrap_or(line).to_owned()))
        .collect();
    if let Some(first) = lines.first_mut() {
        first.style = head;
    }
    Text::from(lines)
}

const HELP: &str = "
q  quit                 p  pause, go on        s  sort by rate, p99, name
?  this text, and back

fuse     requests of the kernel; now: read and not answered yet
cache    hits: reads that needed no device; held back: writers that wait, 100 % is
         one of them all the time; used: of what was read ahead and has left
device   request: mean size; now: with the device; queue: waiting for it; mean,
         p99: time from dispatch to completion, p99 as a power of two
request  kinds of requests with their time to the answer
waiting  requests that are not answered yet, the oldest first
";

#[cfg(test)]
mod tests {
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::KeyEvent;

    use super::rates::tests::sample;
    use super::*;

    fn view() -> View {
        let mut view = View::new(
            Path::new("/mnt/a\u{1b}b"),
            sample(1_000_000, 10, &[500], &[]),
        );
        view.take_sample(sample(2_000_000, 110, &[500, 900], &[5; 99]));
        view
    }

    fn shown(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn everything_fits_on_a_small_screen() {
        let mut view = view();
        let text = shown(&view, 80, 24);
        for part in [
            "braidfs  1.0 s  by rate  ? help  FROZEN  /mnt/a?b",
            "hits 100.0 %",
            "dirty 0 B",
            "a.img",
            "waiting",
            "99 ",
            "5 us",
            "a?b",
            "2 s",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        view.help = true;
        assert!(shown(&view, 80, 24).contains("the oldest first"));
    }

    #[test]
    fn no_size_is_too_small() {
        let mut view = view();
        for help in [false, true] {
            view.help = help;
            for (width, height) in [(1, 1), (80, 1), (1, 24), (10, 3), (40, 8), (300, 100)] {
                let _text = shown(&view, width, height);
            }
        }
    }

    #[test]
    fn many_devices_are_cut_and_counted() {
        let mut view = view();
        if let Some(interval) = &mut view.shown {
            let device = interval.devices[0].clone();
            interval.devices = vec![device; 40];
        }
        let text = shown(&view, 80, 24);
        assert!(
            text.contains("... 36 more") && text.contains("waiting"),
            "{text}"
        );
    }

    #[test]
    fn keys() {
        let mut view = view();
        let mut press =
            |code, modifiers| view.take_event(&Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(press(KeyCode::Char('p'), KeyModifiers::NONE), Step::Draw);
        assert_eq!(press(KeyCode::Char('s'), KeyModifiers::NONE), Step::Draw);
        assert_eq!(press(KeyCode::Char('x'), KeyModifiers::NONE), Step::Stay);
        assert_eq!(press(KeyCode::Char('c'), KeyModifiers::CONTROL), Step::Quit);
        assert_eq!(press(KeyCode::Char('q'), KeyModifiers::NONE), Step::Quit);
        assert!(view.paused && view.sort == Sort::Latency);
        let before = view.shown.as_ref().map(|interval| interval.seconds);
        view.take_sample(sample(9_000_000, 110, &[], &[]));
        assert_eq!(view.shown.as_ref().map(|interval| interval.seconds), before);
        view.paused = false;
        view.take_sample(sample(10_000_000, 110, &[], &[]));
        assert_eq!(view.shown.map(|interval| interval.seconds), Some(1.0));
    }
}
