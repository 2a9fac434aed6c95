//! Tests of tracing: contexts, filters, rings.

use super::*;
use std::sync::Mutex;

/// Tracing is one for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// What other tests do meanwhile is none of it.
const OURS: Filter = Filter {
    ops: u64::MAX,
    file: 4,
};

fn events(session: &Session) -> Vec<Event> {
    let mut events = Vec::new();
    session.drain(|event| events.push(event));
    events
}

fn request(unique: u64, op: u8, file: u64) -> u64 {
    begin_request(&Begin {
        unique,
        op,
        file,
        offset: 0,
        len: 1,
        pid: 1,
    })
}

#[test]
fn one_looks_at_a_time_and_what_was_before_is_gone() {
    let _alone = ALONE.lock();
    assert!(!is_on() && request(2, 3, 4) == NOBODY);
    let session = Session::begin(OURS).unwrap();
    assert!(Session::begin(OURS).is_none());
    assert_eq!(request(2, 3, 4), 2);
    drop(session);
    assert!(!is_on());
    let session = Session::begin(OURS).unwrap();
    let of_ours = events(&session);
    assert!(
        of_ours.iter().all(|event| event.context != 2),
        "{of_ours:?}"
    );
}

#[test]
fn steps_belong_to_the_context_they_are_taken_in() {
    let _alone = ALONE.lock();
    let session = Session::begin(OURS).unwrap();
    let context = request(1002, 3, 4);
    {
        let _in = enter(context);
        step(Kind::Hit, [4, 5, 6, 0, 0]);
        let behind = background(4);
        let _behind = enter(behind);
        step(Kind::Miss, [0; 5]);
        assert!(current() & BACKGROUND != 0);
    }
    step(Kind::Hit, [0; 5]);
    reply(context, -5, now());
    let all = events(&session);
    let of_request: Vec<_> = all
        .iter()
        .filter(|event| event.context == context)
        .collect();
    let kinds: Vec<_> = of_request.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [Kind::Begin, Kind::Hit, Kind::Served, Kind::Reply]);
    assert_eq!(of_request[3].values[0].cast_signed(), -5);
    assert!(all.iter().all(|event| event.context != NOBODY));
}

#[test]
fn others_leave_nothing() {
    let _alone = ALONE.lock();
    let filter = Filter {
        ops: 1 << 3,
        file: 77,
    };
    let session = Session::begin(filter).unwrap();
    for (op, file) in [(3, 78), (4, 77)] {
        let _in = enter(request(2002, op, file));
        step(Kind::Hit, [0; 5]);
        assert_eq!(kiobuf_number(), 0);
    }
    assert_eq!(kiobuf_number(), 0, "of nobody in particular");
    let _behind = enter(background(77));
    assert_eq!(kiobuf_number(), 0, "of background work");
    assert_eq!(request(2004, 3, 77), 2004);
    let all = events(&session);
    assert_eq!(all.len(), 1, "{all:?}");
}

#[test]
fn a_full_ring_drops_and_counts() {
    let _alone = ALONE.lock();
    let session = Session::begin(OURS).unwrap();
    let asked = 3 * ring::EVENTS;
    for _ in 0..asked {
        request(3002, 1, 4);
    }
    let mut given = 0;
    let dropped = session.drain(|event| {
        given += usize::from(event.context == 3002);
    });
    assert!(given <= ring::EVENTS && given > 0, "{given}");
    assert_eq!(given as u64 + dropped, asked as u64);
    request(3004, 1, 4);
    assert_eq!(events(&session).len(), 1, "there is room again");
}

#[test]
fn threads_that_share_a_ring_lose_nothing_uncounted() {
    const EACH: u64 = 20_000;
    let _alone = ALONE.lock();
    let session = Session::begin(OURS).unwrap();
    let mut last = [None; 4];
    let mut seen = 0;
    let mut take = |event: Event| {
        let Some(nth) = event.context.checked_sub(4000) else {
            return;
        };
        assert!(event.values.iter().all(|value| *value == event.values[0]));
        let last = &mut last[usize::try_from(nth).unwrap()];
        assert!(*last < Some(event.values[0]), "out of order");
        *last = Some(event.values[0]);
        seen += 1;
    };
    let mut dropped = 0;
    std::thread::scope(|scope| {
        let worker = |nth: u64| {
            move || {
                THREAD.set(Some(Thread { id: 1, ring: 0 }));
                for value in 0..EACH {
                    step_in(4000 + nth, Kind::Hit, [value; 5]);
                }
            }
        };
        let workers: Vec<_> = (0..4).map(|nth| scope.spawn(worker(nth))).collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            dropped += session.drain(&mut take);
        }
    });
    dropped += session.drain(&mut take);
    assert_eq!(seen + dropped, 4 * EACH);
}
