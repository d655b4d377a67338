//! One kind of state of a unit: whole or as slices, here or on its way.

use std::ops::Range;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::{CommClock, ZeroError, pool::Pool, unit::torch_error};
use crate::comm::Ticket;
use crate::plan::{BufferKind, Holding, ShardMap};

/// A piece of the buffer and this rank's slice of it.
#[derive(Debug)]
struct PieceState {
    /// Index in the shard map.
    id: usize,
    /// Elements of the whole buffer.
    range: Range<usize>,
    /// The own slice: elements of the whole buffer.
    own: Range<usize>,
    /// The same as elements of the owned state, the own slices of all pieces in order.
    local: Range<usize>,
    /// Collectives under way, the oldest first.
    under_way: Vec<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    ticket: Ticket,
    operation: &'static str,
    /// It works on the own slice where that is held apart, and leaves the whole buffer alone.
    apart: bool,
}

/// Weights or gradients of a unit as a rank holds them.
///
/// A piece that is under way in a collective is reached through functions that wait for it first.
/// Views that were made before it left see what the collective writes: they live for one action.
#[derive(Debug)]
pub(super) struct Buffer {
    /// The unit's name, for messages.
    unit: String,
    kind: Kind,
    length: usize,
    /// `[padded]`. Where the buffer is held as slices, only between `hold` and `release`.
    whole: Option<Tensor>,
    /// `[owned]`: the own slices of all pieces one after the other, where it is held as slices.
    slices: Option<Tensor>,
    pieces: Vec<PieceState>,
}

impl Buffer {
    /// Zeros for one buffer of `unit`, as member `index` of the shard group holds it.
    pub(super) fn new(
        map: &ShardMap,
        (unit, name): (usize, &str),
        buffer: BufferKind,
        index: usize,
        holding: Holding,
        (kind, device): (Kind, Device),
    ) -> Result<Self, tch::TchError> {
        let length = map.padded_len(unit, buffer);
        let zeros = |length: usize| Tensor::f_zeros([length as i64], (kind, device));
        let mut start = 0;
        let pieces = map.pieces_of(unit, buffer).map(|id| {
            let own = map.slice(id, index);
            let local = start..start + own.len();
            start = local.end;
            PieceState {
                id,
                range: map.pieces()[id].range.clone(),
                own,
                local,
                under_way: Vec::new(),
            }
        });
        let pieces: Vec<PieceState> = pieces.collect();
        Ok(Self {
            unit: name.to_owned(),
            kind,
            length,
            whole: (holding == Holding::Whole)
                .then(|| zeros(length))
                .transpose()?,
            slices: (holding == Holding::Slices)
                .then(|| zeros(map.owned_len(unit, buffer)))
                .transpose()?,
            pieces,
        })
    }

    /// The whole buffer, after waiting for everything under way.
    pub(super) fn whole(&mut self, clock: &mut CommClock) -> Result<&Tensor, ZeroError> {
        for position in 0..self.pieces.len() {
            self.settle(position, clock)?;
        }
        self.whole.as_ref().ok_or(ZeroError::NotHeld)
    }

    /// Waits for what is under way on a piece.
    pub(super) fn settle(
        &mut self,
        position: usize,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        let piece = &mut self.pieces[position];
        let all = piece.under_way.len();
        piece.wait_for(all, clock)
    }

    /// View of the own slice of a piece, after waiting for what is under way on it.
    pub(super) fn own(
        &mut self,
        position: usize,
        clock: &mut CommClock,
    ) -> Result<Tensor, ZeroError> {
        self.settle(position, clock)?;
        self.own_view(position)
    }

    /// Where the own slice of each piece lies in the whole buffer and in the owned state, which is
    /// those slices one after the other.
    pub(super) fn owned(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let pieces = self.pieces.iter();
        pieces.map(|piece| (piece.own.clone(), piece.local.clone()))
    }

    /// Where the own slice of one piece lies in the owned state.
    pub(super) fn local(&self, position: usize) -> Range<usize> {
        self.pieces[position].local.clone()
    }

    /// Elements that last from step to step.
    pub(super) fn held_len(&self) -> usize {
        match &self.slices {
            Some(slices) => slices.numel(),
            None => self.length,
        }
    }

    /// What lasts from step to step. Slices of weights are there whatever is under way: a gather
    /// only reads them; a whole buffer is waited for.
    pub(super) fn held(&mut self, clock: &mut CommClock) -> Result<Tensor, ZeroError> {
        match &self.slices {
            Some(slices) => Ok(slices.shallow_clone()),
            None => self.whole(clock).map(Tensor::shallow_clone),
        }
    }

    /// Whether only the own slices last from step to step.
    pub(super) fn sliced(&self) -> bool {
        self.slices.is_some()
    }

    /// Takes a buffer for the whole.
    pub(super) fn hold(&mut self, pool: &mut Pool) -> Result<(), tch::TchError> {
        if self.whole.is_none() {
            self.whole = Some(pool.take(self.kind, self.length)?);
        }
        Ok(())
    }

    /// Sets the whole buffer to zero.
    pub(super) fn zero(&mut self) -> Result<(), tch::TchError> {
        match &mut self.whole {
            Some(whole) => whole.f_zero_().map(drop),
            None => Ok(()),
        }
    }

    /// Gives the buffer for the whole back. The own slice of weights is not lost: it lies in the
    /// slices all the time; that of gradients arrives there when they are reduced, and may still be
    /// on its way between replicas.
    pub(super) fn release(
        &mut self,
        pool: &mut Pool,
        clock: &mut CommClock,
    ) -> Result<(), ZeroError> {
        for piece in &mut self.pieces {
            let on_whole = piece.under_way.iter().take_while(|one| !one.apart).count();
            piece.wait_for(on_whole, clock)?;
        }
        if self.sliced()
            && let Some(whole) = self.whole.take()
        {
            pool.give(whole);
        }
        Ok(())
    }

    /// Sets a piece of the whole buffer to zero, where it lasts from step to step.
    pub(super) fn clear(&mut self, position: usize) -> Result<(), tch::TchError> {
        match &self.whole {
            Some(whole) if !self.sliced() => slice_of(whole, &self.pieces[position].range)?
                .f_zero_()
                .map(drop),
            _ => Ok(()),
        }
    }

    /// Starts a collective on a piece of the whole buffer. It gets views of the piece, of the own
    /// slice therein, and of the own slice where that is held apart.
    pub(super) fn start(
        &mut self,
        position: usize,
        operation: &'static str,
        collective: impl FnOnce(Views) -> Result<Ticket, tch::TchError>,
        torch: impl Fn(tch::TchError) -> ZeroError,
    ) -> Result<(), ZeroError> {
        let whole = self.whole.as_ref().ok_or(ZeroError::NotHeld)?;
        let PieceState { range, own, .. } = &self.pieces[position];
        let views = Views {
            piece: slice_of(whole, range).map_err(&torch)?,
            own: slice_of(whole, own).map_err(&torch)?,
            slice: match &self.slices {
                Some(_) => Some(self.own_view(position)?),
                None => None,
            },
        };
        let ticket = collective(views).map_err(&torch)?;
        self.pieces[position].under_way.push(UnderWay {
            ticket,
            operation,
            apart: false,
        });
        Ok(())
    }

    /// Starts a collective on the own slice of a piece, which gets the ticket of the collective
    /// before it.
    pub(super) fn start_on_own(
        &mut self,
        position: usize,
        operation: &'static str,
        collective: impl FnOnce(Tensor, Option<&Ticket>) -> Ticket,
    ) -> Result<(), ZeroError> {
        let (own, apart) = (self.own_view(position)?, self.sliced());
        let under_way = &mut self.pieces[position].under_way;
        let ticket = collective(own, under_way.last().map(|last| &last.ticket));
        under_way.push(UnderWay {
            ticket,
            operation,
            apart,
        });
        Ok(())
    }

    fn own_view(&self, position: usize) -> Result<Tensor, ZeroError> {
        let PieceState { own, local, .. } = &self.pieces[position];
        let view = match (&self.slices, &self.whole) {
            (Some(slices), _) => slice_of(slices, local),
            (None, Some(whole)) => slice_of(whole, own),
            (None, None) => return Err(ZeroError::NotHeld),
        };
        view.map_err(torch_error(&self.unit))
    }
}

impl PieceState {
    /// Waits for the `count` oldest collectives under way.
    fn wait_for(&mut self, count: usize, clock: &mut CommClock) -> Result<(), ZeroError> {
        for one in self.under_way.drain(..count) {
            let began = Instant::now();
            let (_, traffic) = one.ticket.wait()?;
            clock.count(one.operation, Some(self.id), began, traffic);
        }
        Ok(())
    }
}

/// What a collective on a piece works with.
pub(super) struct Views {
    /// The piece, in the whole buffer.
    pub(super) piece: Tensor,
    /// The own slice, in the whole buffer.
    pub(super) own: Tensor,
    /// The own slice, where it is held apart.
    pub(super) slice: Option<Tensor>,
}

pub(super) fn slice_of(buffer: &Tensor, range: &Range<usize>) -> Result<Tensor, tch::TchError> {
    buffer.f_narrow(0, range.start as i64, range.len() as i64)
}
