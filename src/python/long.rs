//! Long kernels: run detached on a thread of their own while the caller polls for Ctrl-C and reports progress.

use crate::cancel::Cancel;
use crate::{Error, Result};
use pyo3::prelude::*;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const POLL: Duration = Duration::from_millis(50);

/// Runs `kernel` without the GIL. Every 50 ms the calling thread checks for signals and, if given, calls
/// `progress(done)`; an exception from either cancels the kernel and is raised once it has stopped.
pub fn run_long<R: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    kernel: impl FnOnce(&Cancel) -> Result<R> + Send,
) -> PyResult<R> {
    let cancel = Cancel::new();
    let progress = progress.map(|p| p.clone().unbind());
    py.detach(|| {
        std::thread::scope(|scope| {
            let (send, receive) = channel::<()>();
            let token = &cancel;
            let worker = scope.spawn(move || {
                let result = kernel(token);
                drop(send);
                result
            });
            let mut raised = None;
            while let Err(RecvTimeoutError::Timeout) = receive.recv_timeout(POLL) {
                if raised.is_some() {
                    continue;
                }
                let poll = Python::attach(|py| -> PyResult<()> {
                    py.check_signals()?;
                    if let Some(callback) = &progress {
                        callback.call1(py, (cancel.done(),))?;
                    }
                    Ok(())
                });
                if let Err(err) = poll {
                    cancel.cancel();
                    raised = Some(err);
                }
            }
            let result = worker.join();
            match (raised, result) {
                (Some(err), _) => Err(err),
                (None, Ok(result)) => {
                    if let (Ok(_), Some(callback)) = (&result, &progress) {
                        Python::attach(|py| callback.call1(py, (cancel.done(),)))?;
                    }
                    result.map_err(PyErr::from)
                }
                (None, Err(panic)) => std::panic::resume_unwind(panic),
            }
        })
    })
}

/// Burns time in the pool until cancelled or `seconds` have passed: lets a test interrupt a known kernel.
pub fn spin(cancel: &Cancel, seconds: f64) -> Result<()> {
    let start = std::time::Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        cancel.check()?;
        std::thread::sleep(Duration::from_millis(1));
        cancel.advance(1);
    }
    if seconds < 0.0 {
        return Err(Error::value("seconds", "0 or more", seconds));
    }
    Ok(())
}
