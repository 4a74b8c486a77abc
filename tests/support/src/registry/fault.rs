//! Rules: which requests go wrong, and how. Matching is a pure function of the request and the rule's counter.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;

/// What is done to a matching request.
#[derive(Clone, Debug)]
pub enum Action {
    /// Nothing is answered until the rule is cleared or the client is gone; then later rules are tried.
    Hang,
    /// The body stops after this many bytes and goes on when the rule is cleared.
    Stall {
        /// Bytes sent before.
        after: u64,
    },
    /// The answer waits; later rules are tried too.
    Delay(Duration),
    /// This status with these headers and no content: `(503, [("Retry-After", "1")])`.
    Status(u16, Vec<(String, String)>),
    /// The usual answer with these headers set, in place of its own where they have the same name; later rules are
    /// tried too.
    Headers(Vec<(String, String)>),
    /// The whole content with status 200, whatever range was asked for.
    Full200,
    /// Only the first bytes of the range asked for, with headers that say so.
    Shorten(u64),
    /// Headers as usual, but the connection is closed after this many bytes of the body.
    Truncate(u64),
    /// This bit of the content, counted from the lowest of its first byte, is flipped when it is sent.
    FlipBit(u64),
    /// These bytes are served in place of the content, ranges taken from them.
    Substitute(Bytes),
    /// 307 to `to` + the path, with a signature in the query that the target (any server of the process) accepts in
    /// place of credentials.
    Redirect {
        /// Where to, as `http://127.0.0.1:1234`; empty for a relative location.
        to: String,
        /// After this many uses the signature is answered 403.
        expires_after: Option<u64>,
    },
    /// The connection is reset before anything is answered or, of an upload, stored.
    Reset,
    /// The first so many bytes of the request's body are taken, and stored if it is an upload's; then the connection
    /// is reset. `u64::MAX`: everything is done as asked, and only the answer is missing.
    AcceptThenReset(u64),
    /// The body is sent at this many bytes a second.
    Throttle(u64),
}

/// An action and the requests it is for: all that pass authentication, narrowed by the methods below.
#[derive(Clone, Debug)]
pub struct Rule {
    action: Action,
    method: Option<String>,
    path: Option<String>,
    range: Option<Range<u64>>,
    skip: u64,
    times: Option<u64>,
}

impl Rule {
    /// A rule for every request.
    pub fn new(action: Action) -> Rule {
        Rule { action, method: None, path: None, range: None, skip: 0, times: None }
    }

    /// Only for this method.
    pub fn method(mut self, method: &str) -> Rule {
        self.method = Some(method.to_owned());
        self
    }

    /// Only for paths that hold this text: a repository, `/blobs/`, a digest.
    pub fn path(mut self, part: impl Into<String>) -> Rule {
        self.path = Some(part.into());
        self
    }

    /// Only for requests of blobs that ask for some byte of this range, where those without a range ask for all, and
    /// for chunks that bring some byte of it.
    pub fn overlapping(mut self, range: Range<u64>) -> Rule {
        self.range = Some(range);
        self
    }

    /// Lets the first `count` matching requests pass.
    pub fn skip(mut self, count: u64) -> Rule {
        self.skip = count;
        self
    }

    /// Acts this many times, then never again.
    pub fn times(mut self, count: u64) -> Rule {
        self.times = Some(count);
        self
    }

    /// Acts on the `number`th matching request only, counted from 1.
    pub fn nth(self, number: u64) -> Rule {
        self.skip(number - 1).times(1)
    }
}

/// Names a rule of one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId(pub(super) u64);

/// A rule in force and how often it met its requests.
#[derive(Debug)]
pub(super) struct ActiveRule {
    pub(super) id: RuleId,
    rule: Rule,
    seen: u64,
    pub(super) hits: u64,
}

/// What rules look at.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    /// Bytes of the blob the request is about, asked for or brought; `None` if it is about no blob.
    pub(super) range: Option<Range<u64>>,
    /// Carries a signature from a redirect, so it is not redirected again.
    pub(super) signed: bool,
}

impl ActiveRule {
    pub(super) fn new(id: RuleId, rule: Rule) -> ActiveRule {
        ActiveRule { id, rule, seen: 0, hits: 0 }
    }

    /// The action if the rule is for this request and its turn has come; counts.
    pub(super) fn meet(&mut self, asked: &Asked<'_>) -> Option<Action> {
        let rule = &self.rule;
        let overlaps = |range: &Range<u64>| {
            asked.range.as_ref().is_some_and(|asked| range.start < asked.end && asked.start < range.end)
        };
        let matches = rule.method.as_ref().is_none_or(|method| method == asked.method)
            && rule.path.as_ref().is_none_or(|part| asked.path.contains(part))
            && rule.range.as_ref().is_none_or(overlaps)
            && !(asked.signed && matches!(rule.action, Action::Redirect { .. }));
        if !matches {
            return None;
        }
        self.seen += 1;
        if self.seen <= rule.skip || rule.times.is_some_and(|times| self.hits >= times) {
            return None;
        }
        self.hits += 1;
        Some(rule.action.clone())
    }
}

/// What the rules decided for one request.
#[derive(Debug)]
pub(super) enum Turn {
    /// Wait for this rule to be cleared, then ask again from the rule after it.
    Hang(RuleId),
    /// Wait so long, then ask again from the rule after it.
    Delay(RuleId, Duration),
    /// Remember these headers, then ask again from the rule after it.
    Headers(RuleId, Vec<(String, String)>),
    /// Do this.
    Act(RuleId, Action),
    /// Answer as usual.
    Pass,
}

/// Asks the rules added after `after`, in order of their adding.
pub(super) fn next_turn(rules: &mut [ActiveRule], after: Option<RuleId>, asked: &Asked<'_>) -> Turn {
    for active in rules.iter_mut().filter(|active| after.is_none_or(|after| active.id.0 > after.0)) {
        match active.meet(asked) {
            None => {}
            Some(Action::Hang) => return Turn::Hang(active.id),
            Some(Action::Delay(time)) => return Turn::Delay(active.id, time),
            Some(Action::Headers(headers)) => return Turn::Headers(active.id, headers),
            Some(action) => return Turn::Act(active.id, action),
        }
    }
    Turn::Pass
}
