//! Fills, changes and questions in orders that a scheduler chooses: at each step that one of them takes, another one may go on. The same orders are tried in each run.

use std::{sync::Arc, time::Duration};

use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    thread,
};

use super::{
    Cache, Fact,
    sync::{AtomicU64, Ordering, explored},
    table::{Stamp, Table, Value},
};
use crate::{
    grant::{Facts, Grant, Subject},
    token::Digest,
};

const SEED: u64 = 7;

/// In orders where all take turns, and in orders where one goes on until it is interrupted, `depth` times.
fn explore(orders: usize, depth: usize, story: impl Fn() + Clone + Send + Sync + 'static) {
    explored(|| {
        let again = story.clone();
        Runner::new(RandomScheduler::new_from_seed(SEED, orders), Config::new()).run(again);
        Runner::new(PctScheduler::new_from_seed(SEED, depth, orders), Config::new()).run(story);
    });
}

fn digest() -> Digest {
    Digest::from_slice(&[1; 24]).expect("24 bytes")
}

/// What a store says of one token, and what its changers have said of it: both as numbers that grow.
struct World {
    cache: Cache,
    stored: AtomicU64,
    announced: AtomicU64,
}

impl World {
    fn new() -> Arc<Self> {
        let cache = Cache::new(0, Duration::from_hours(1));
        cache.serve_for_ever();
        Arc::new(Self { cache, stored: AtomicU64::new(0), announced: AtomicU64::new(0) })
    }

    fn announced(&self) -> u64 {
        self.announced.load(Ordering::SeqCst)
    }

    /// A change that somebody else has made, as the fence hears of it.
    fn hear(&self, subject: &Subject) {
        let version = self.stored.fetch_add(1, Ordering::SeqCst) + 1;
        self.cache.bury(subject);
        self.announced.fetch_max(version, Ordering::SeqCst);
    }

    /// A change of our own.
    fn make(&self, subject: &Subject) {
        self.cache.embargo(subject);
        let version = self.stored.fetch_add(1, Ordering::SeqCst) + 1;
        self.cache.lift(subject);
        self.announced.fetch_max(version, Ordering::SeqCst);
    }

    /// Asks what is known, and reads the store if nothing is.
    fn ask(&self) {
        let floor = self.announced();
        if let Some(Fact::Grant(found)) = self.cache.get(&digest()) {
            let found: u64 = found.display_name().parse().expect("a number");
            assert!(found >= floor, "{found} was found, and {floor} had been announced before");
            return;
        }
        let ticket = self.cache.ticket();
        let read = self.stored.load(Ordering::SeqCst);
        // Others join.
        let floor = self.announced();
        if self.cache.admit(digest(), &Fact::Grant(Grant::of(&Facts::example(&read.to_string()))), ticket) {
            assert!(read >= floor, "{read} was told to somebody who joined when {floor} had been announced");
        }
    }
}

/// Two who change by these means, two who ask.
fn tell(subject: &Subject, changes: [Change; 2]) {
    let world = World::new();
    let mut threads = Vec::new();
    for change in changes {
        let (world, subject) = (Arc::clone(&world), subject.clone());
        threads.push(thread::spawn(move || {
            change(&world, &subject);
            change(&world, &subject);
        }));
    }
    for _ in 0..2 {
        let world = Arc::clone(&world);
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                world.ask();
            }
        }));
    }
    for thread in threads {
        thread.join().expect("the truth");
    }
    assert_eq!(world.announced(), 4);
    world.ask();
}

type Change = fn(&World, &Subject);

const CHANGES: [[Change; 2]; 3] = [[World::hear, World::hear], [World::make, World::hear], [World::make, World::make]];

#[test]
fn in_no_order_is_an_old_fact_of_a_token_found() {
    for changes in CHANGES {
        explore(130, 4, move || tell(&Subject::Token(digest()), changes));
    }
}

#[test]
fn in_no_order_is_an_old_fact_found_after_a_change_of_all_that_it_hangs_on() {
    let Facts { workspace, principal: id, .. } = Facts::example("");
    for subject in [Subject::Workspace(workspace.clone()), Subject::Principal { workspace, id }] {
        for changes in CHANGES {
            let subject = subject.clone();
            explore(70, 4, move || tell(&subject, changes));
        }
    }
}

/// As when the log was pruned before this server has read it.
#[test]
fn in_no_order_does_an_old_fact_outlive_that_everything_is_forgotten() {
    fn forget(world: &World, _: &Subject) {
        let version = world.stored.fetch_add(1, Ordering::SeqCst) + 1;
        world.cache.clear();
        world.announced.fetch_max(version, Ordering::SeqCst);
    }
    explore(8, 4, || tell(&Subject::Token(digest()), [forget, forget]));
}

/// Records so large that the ring comes round while one of them is read.
#[test]
fn in_no_order_is_a_record_found_that_was_overwritten_meanwhile() {
    const WORDS: usize = 7_000;
    const STAMP: Stamp = Stamp { generation: 1, marks: 0 };
    // Of the same shard: that is in their last byte.
    let digest = |number: u8| Digest::from_slice(&[&[number; 16][..], &[0; 8]].concat()).expect("24 bytes");
    let value = |number: u8| vec![number; WORDS * 8];
    explore(40, 3, move || {
        let table = Arc::new(Table::new(0));
        table.insert(&digest(1), STAMP, &value(1));
        let writer = Arc::clone(&table);
        let writes = thread::spawn(move || (2..8).for_each(|number| writer.insert(&digest(number), STAMP, &value(number))));
        let mut found = Value::new();
        for _ in 0..2 {
            if table.get(&digest(1), &mut found).is_some() {
                assert!(found.iter().all(|byte| *byte == 1) && found.len() == WORDS * 8, "a torn record");
            }
        }
        writes.join().expect("written");
    });
}
