//! Modification times: RFC 3339 text to seconds since the epoch.
//!
//! Writers emit UTC with whole seconds; a fraction and an offset are accepted as the RFC has them. Leap seconds
//! are not: tar cannot express them.

use super::Timestamp;

/// Parses `2006-01-02T15:04:05[.999999999](Z|+07:00)`. Digits behind the ninth of a fraction are dropped.
pub(super) fn parse(text: &str) -> Option<Timestamp> {
    let mut rest = Cursor(text.as_bytes());
    let year = rest.number(4)?;
    rest.expect(b'-')?;
    let month = rest.number(2)?;
    rest.expect(b'-')?;
    let day = rest.number(2)?;
    rest.expect(b'T')?;
    let hour = rest.number(2)?;
    rest.expect(b':')?;
    let minute = rest.number(2)?;
    rest.expect(b':')?;
    let second = rest.number(2)?;
    let nanos = match rest.expect(b'.') {
        Some(()) => rest.fraction()?,
        None => 0,
    };
    let offset = match rest.next()? {
        b'Z' => 0,
        sign @ (b'+' | b'-') => {
            let hours = rest.number(2)?;
            rest.expect(b':')?;
            let minutes = rest.number(2)?;
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3600 + minutes * 60;
            if sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let valid = rest.0.is_empty()
        && (1..=12).contains(&month)
        && (1..=days_in_month(year, month)).contains(&day)
        && hour <= 23
        && minute <= 59
        && second <= 59;
    let secs = || days_since_epoch(year, month, day) * 86400 + hour * 3600 + minute * 60 + second - offset;
    valid.then(|| Timestamp { secs: secs(), nanos })
}

struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn next(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.0 = self.0.strip_prefix(&[byte])?;
        Some(())
    }

    fn digit(&mut self) -> Option<i64> {
        let (&byte, rest) = self.0.split_first().filter(|(byte, _)| byte.is_ascii_digit())?;
        self.0 = rest;
        Some(i64::from(byte - b'0'))
    }

    /// Exactly `len` digits.
    fn number(&mut self, len: usize) -> Option<i64> {
        (0..len).try_fold(0, |number, _| Some(number * 10 + self.digit()?))
    }

    /// At least one digit; the value in billionths.
    fn fraction(&mut self) -> Option<u32> {
        let mut unit = 100_000_000;
        let mut nanos = self.digit()? as u32 * unit;
        while let Some(digit) = self.digit() {
            unit /= 10;
            nanos += digit as u32 * unit;
        }
        Some(nanos)
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 => 28 + i64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date of the proleptic Gregorian calendar, years 0 to 9999.
///
/// Years are counted from March, so that the leap day is the last: then the months before `month` have
/// `(153 m + 2) / 5` days.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + leap_days + day_of_year - 719_468 // 0000-03-01 to 1970-01-01
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        // Expected values from `date -u -d TEXT +%s`.
        for (text, secs, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("1969-12-31T23:59:59Z", -1, 0),
            ("1969-12-31T23:59:59.25Z", -1, 250_000_000),
            ("2006-01-02T15:04:05Z", 1_136_214_245, 0),
            ("2006-01-02T15:04:05.000000001Z", 1_136_214_245, 1),
            ("2006-01-02T15:04:05.1234567899Z", 1_136_214_245, 123_456_789),
            ("2006-01-02T15:04:05+07:00", 1_136_214_245 - 7 * 3600, 0),
            ("2006-01-02T15:04:05.5-00:30", 1_136_214_245 + 1800, 500_000_000),
            ("2000-02-29T00:00:00Z", 951_782_400, 0),
            ("2000-03-01T00:00:00Z", 951_868_800, 0),
            ("1900-02-28T00:00:00Z", -2_203_977_600, 0),
            ("2024-12-31T23:59:59Z", 1_735_689_599, 0),
            ("0000-01-01T00:00:00Z", -62_167_219_200, 0),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
        ] {
            assert_eq!(parse(text), Some(Timestamp { secs, nanos }), "{text}");
        }
    }

    #[test]
    fn every_month_follows_the_one_before() {
        let mut expected = days_since_epoch(0, 1, 1);
        for year in 0..=9999 {
            for month in 1..=12 {
                assert_eq!(days_since_epoch(year, month, 1), expected, "{year}-{month}");
                expected += days_in_month(year, month);
                assert_eq!(days_since_epoch(year, month, days_in_month(year, month)), expected - 1);
            }
        }
    }

    #[test]
    fn not_times() {
        for text in [
            "",
            "2006",
            "2006-01-02",
            "2006-01-02T15:04:05",
            "2006-01-02 15:04:05Z",
            "2006-01-02T15:04:05z",
            "2006-01-02T15:04:05ZZ",
            "2006-01-02T15:04:05.Z",
            "2006-01-02T15:04:05,5Z",
            "2006-01-02T15:04:05+24:00",
            "2006-01-02T15:04:05+0700",
            "2006-1-02T15:04:05Z",
            "+006-01-02T15:04:05Z",
            "12006-01-02T15:04:05Z",
            "2006-00-02T15:04:05Z",
            "2006-13-02T15:04:05Z",
            "2006-02-29T15:04:05Z",
            "1900-02-29T00:00:00Z",
            "2006-04-31T15:04:05Z",
            "2006-01-00T15:04:05Z",
            "2006-01-02T24:00:00Z",
            "2006-01-02T15:60:05Z",
            "2006-01-02T15:04:60Z",
            "2006-01-02T15:04:0\u{665}Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
