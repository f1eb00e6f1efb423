//! What the threads of this room share. In tests each use of it is a step at which a scheduler may let another thread go on.

#[cfg(not(test))]
pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize};
pub(super) use std::sync::atomic::{Ordering, fence};

#[cfg(not(test))]
pub(super) use parking_lot::Mutex;

#[cfg(test)]
pub(super) use stepped::{AtomicU64, AtomicUsize, Mutex, explored};

#[cfg(test)]
mod stepped {
    use std::{cell::Cell, ops::Deref, sync::atomic};

    use shuttle::thread;

    thread_local! {
        static IS_EXPLORED: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `tests` so that they may be a scheduler's, whose threads are all of this one.
    pub(in crate::cache) fn explored(tests: impl FnOnce()) {
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                IS_EXPLORED.set(false);
            }
        }
        IS_EXPLORED.set(true);
        let _end = End;
        tests();
    }

    fn step() {
        if IS_EXPLORED.get() {
            // Whatever it is that is looked at.
            shuttle::sync::atomic::AtomicBool::new(false).load(atomic::Ordering::SeqCst);
        }
    }

    pub(in crate::cache) type AtomicU64 = Stepped<atomic::AtomicU64>;
    pub(in crate::cache) type AtomicUsize = Stepped<atomic::AtomicUsize>;

    /// Something that takes a step whenever it is used.
    #[derive(Default)]
    pub(in crate::cache) struct Stepped<T>(T);

    impl<T> Deref for Stepped<T> {
        type Target = T;

        fn deref(&self) -> &T {
            step();
            &self.0
        }
    }

    impl Stepped<atomic::AtomicU64> {
        pub(in crate::cache) const fn new(value: u64) -> Self {
            Self(atomic::AtomicU64::new(value))
        }
    }

    impl Stepped<atomic::AtomicUsize> {
        pub(in crate::cache) const fn new(value: usize) -> Self {
            Self(atomic::AtomicUsize::new(value))
        }
    }

    #[derive(Default)]
    pub(in crate::cache) struct Mutex<T>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        pub(in crate::cache) const fn new(value: T) -> Self {
            Self(parking_lot::Mutex::new(value))
        }

        pub(in crate::cache) fn lock(&self) -> parking_lot::MutexGuard<'_, T> {
            if !IS_EXPLORED.get() {
                return self.0.lock();
            }
            step();
            loop {
                match self.0.try_lock() {
                    Some(guard) => return guard,
                    None => thread::yield_now(),
                }
            }
        }
    }
}
